"""A reward that differs within a group, so that the timed step always has its update."""


def spread(prompt, response, answer, entry):
    return (len(response) % 7) / 7
