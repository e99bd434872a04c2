"""DeepSpeed's ZeRO as a train backend.

`options` and `settings` need no deepspeed; `engine` is the one module that imports it, late.
"""
