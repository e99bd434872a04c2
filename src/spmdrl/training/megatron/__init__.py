"""The train backend on Megatron-Core. All modules except `checks` import megatron-core."""
