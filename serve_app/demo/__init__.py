"""Stand-in checkpoints: what the demo and the tests draw with where no published weights are at hand."""
