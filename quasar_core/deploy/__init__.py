"""Serve a pair by vLLM or SGLang: the commands, and drafts of ours for vLLM's target."""
