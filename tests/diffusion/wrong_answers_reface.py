"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""


def check_undo__runs_the_step_again(after, eps, a_t, a_prev):
    picture = (after - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    return a_prev**0.5 * picture + (1 - a_prev) ** 0.5 * eps


def check_undo__returns_the_picture(after, eps, a_t, a_prev):
    return (after - (1 - a_prev) ** 0.5 * eps) / a_prev**0.5


def check_undo__forgets_the_noise(after, eps, a_t, a_prev):
    return a_t**0.5 * (after - (1 - a_prev) ** 0.5 * eps) / a_prev**0.5


def check_options__changes_nothing():
    return {}


def check_options__switches_the_loss_on():
    return {"w_id": 0.3, "w_perc": 0.1}
