"""Models that draft: an assistant, a decoder less some blocks, a checkpoint's own head."""
