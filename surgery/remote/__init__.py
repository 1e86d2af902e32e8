"""Weight files that lie elsewhere, read by byte ranges: web servers, the hub, object stores. Knows nothing of checkpoints."""
