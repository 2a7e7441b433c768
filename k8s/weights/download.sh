# Rendered by k8s/render.py from the hub ids in configs/: edit those.
set -euo pipefail
hf download stabilityai/stable-diffusion-xl-base-1.0 --revision 462165984030d82259a11f4367a4eed129e94a7b \
  --include model_index.json \
  --include 'text_encoder/*.json' \
  --include 'text_encoder/*.fp16.safetensors' \
  --include 'text_encoder_2/*.json' \
  --include 'text_encoder_2/*.fp16.safetensors' \
  --include 'tokenizer/*.json' \
  --include 'tokenizer/*.txt' \
  --include 'tokenizer_2/*.json' \
  --include 'tokenizer_2/*.txt' \
  --include 'unet/*.json' \
  --include 'unet/*.fp16.safetensors' \
  --include 'vae/*.json' \
  --include 'vae/*.fp16.safetensors' \
  --include 'scheduler/*.json'
hf download stabilityai/stable-diffusion-xl-refiner-1.0 --revision 5d4cfe854c9a9a87939ff3653551c2b3c99a4356 \
  --include model_index.json \
  --include 'text_encoder_2/*.json' \
  --include 'text_encoder_2/*.fp16.safetensors' \
  --include 'tokenizer_2/*.json' \
  --include 'tokenizer_2/*.txt' \
  --include 'unet/*.json' \
  --include 'unet/*.fp16.safetensors' \
  --include 'scheduler/*.json'
