"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

from shuffle_nb.mobile.bias_loss import bias_weight, normalize_variance


def check_confidence__forgets_to_detach(logits, alpha, beta):
    confidence = logits.softmax(1).amax(1)
    return bias_weight(normalize_variance(confidence, mode="local"), alpha, beta)


def check_confidence__forgets_the_range_of_the_batch(logits, alpha, beta):
    return bias_weight(logits.detach().softmax(1).amax(1), alpha, beta)


def check_step_factors__both_shrink(z):
    return {"sgd": z, "adam": z}


def check_step_factors__exchanged(z):
    return {"sgd": 1.0, "adam": z}
