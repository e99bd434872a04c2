"""Contracts that train backends and rollout engines are held to, with tiny models and rows; none of
it needs pytest.

`backend_contract.check_backend` holds a candidate to the clauses on the ranks of a process group
that runs, and `engine_contract.check_engine` an engine. `python -m spmdrl.testing BACKEND` does the
former from a command line, also under torchrun.
"""
