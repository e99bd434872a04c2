"""A reward that gives signal without a model that can add."""


def even_length(response: str, answer: str) -> float:
    return float(len(response) % 2 == 0)
