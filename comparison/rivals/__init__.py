"""What the service is compared with. Each speaks the same HTTP and draws the same pictures."""
