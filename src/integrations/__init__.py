"""Recovery for other people's training loops, one module or folder per framework; each is imported only where used."""
