"""What runs leave on disk: run directories, journals and checkpoints."""
