"""Rewards that any model gets half the time."""


def even_length(prompt, response, answer, entry):
    return float(len(response) % 2)


def length(prompt, response, answer, entry):
    return len(response) / 100
