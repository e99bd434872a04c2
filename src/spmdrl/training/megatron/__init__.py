"""The train backend on Megatron-Core. `checks` imports nothing of it; every other module does."""
