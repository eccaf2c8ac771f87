"""One agent per node: workers' lives, their output, the local endpoints. It never imports torch and stays small."""
