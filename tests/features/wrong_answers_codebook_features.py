"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_writing__writes_everywhere(model, tokens, layer, code):
    with layer.intervene(lambda ids: torch.full_like(ids, code)):
        return model(tokens)[:, -1]


def check_writing__writes_nothing(model, tokens, layer, code):
    return model(tokens)[:, -1]


def check_writing__leaves_the_edit_in_place(model, tokens, layer, code):
    def change(ids):
        ids[:, -1] = code
        return ids

    layer._interventions.append(change)
    return model(tokens)[:, -1]


def check_rival__takes_the_farthest(known, labels, queries):
    return labels[torch.cdist(queries, known).argmax(1)]


def check_rival__returns_the_row_and_not_the_label(known, labels, queries):
    return torch.cdist(queries, known).argmin(1)
