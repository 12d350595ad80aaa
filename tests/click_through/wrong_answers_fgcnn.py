"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""


def check_fields_seen__forgets_the_kernels(line, stages, num_fields):
    first = last = line
    for stage in reversed(stages):
        first = first * stage.window - stage.above
        last = last * stage.window - stage.above + stage.window - 1
    return range(max(0, first), min(num_fields, last + 1))


def check_fields_seen__forgets_the_padding(line, stages, num_fields):
    first = last = line
    for stage in reversed(stages):
        reach = stage.conv.kernel_size[0] // 2
        first = first * stage.window - reach
        last = last * stage.window + stage.window - 1 + reach
    return range(max(0, first), min(num_fields, last + 1))


def check_fields_seen__goes_forward(line, stages, num_fields):
    first = last = line
    for stage in stages:
        reach = stage.conv.kernel_size[0] // 2
        first = first * stage.window - stage.above - reach
        last = last * stage.window - stage.above + stage.window - 1 + reach
    return range(max(0, first), min(num_fields, last + 1))


def check_order_blind__keeps_a_kernel_of_three():
    return FeatureGeneration(8, 8, (6,), (3,), (8,), (12,))


def check_order_blind__keeps_windows_of_two():
    return FeatureGeneration(8, 8, (6,), (1,), (2,), (12,))


def check_order_blind__makes_too_few():
    return FeatureGeneration(8, 8, (6,), (1,), (8,), (3,))


def check_low_rank__forgets_the_bias(mix, rank):
    return rank * (mix.in_features + mix.out_features)


def check_low_rank__counts_one_layer_only(mix, rank):
    return rank * mix.in_features + mix.out_features
