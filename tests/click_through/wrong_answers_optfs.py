"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""


def check_price_gradient__forgets_the_temperature(logit, temperature, lam):
    s = (temperature * logit).sigmoid()
    return lam * s * (1 - s)


def check_price_gradient__is_the_price_itself(logit, temperature, lam):
    return lam * (temperature * logit).sigmoid()


def check_price_gradient__leaves_the_price_out(logit, temperature, lam):
    s = (temperature * logit).sigmoid()
    return temperature * s * (1 - s)


def check_steps_until_shut__uses_the_gradient_of_plain_descent(init_logit, lr):
    return init_logit / (lr * 0.235)


def check_steps_until_shut__counts_to_minus_the_start(init_logit, lr):
    return 2 * init_logit / lr


def check_by_use__looks_at_norms_only(weight, count, number):
    return weight.norm(dim=1) >= weight.norm(dim=1).sort(descending=True)[0][number - 1]


def check_by_use__looks_at_counts_only(weight, count, number):
    return count >= count.sort(descending=True)[0][number - 1] + 0 * weight[:, 0]


def check_by_use__forgets_the_root(weight, count, number):
    use = weight.norm(dim=1) * count
    return use >= use.sort(descending=True)[0][number - 1]
