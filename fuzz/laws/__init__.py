"""The laws, in causal order: pure functions over (case, observations, reference) that return how much they checked.

A law that had nothing to check has not passed: it returns 0 and is counted as vacuous. The first broken law is raised;
those after it are named in the Violation, so that one bug does not become six. Knows no processes and no Hypothesis.
"""

from collections.abc import Callable, Mapping, Sequence

from fuzz.case import Case, Observation, Violation
from fuzz.laws import advantages, dispatch, forward, liveness, sharded, state, twins, updates

Law = Callable[[Case, Sequence[Observation], Observation], int]

LAWS: tuple[Law, ...] = (
    state.ranks_sit_where_the_order_says,
    state.every_group_is_what_the_order_says,
    state.every_layer_is_there_once,
    state.everything_asked_for_is_done,
    state.forward_passes_change_nothing,
    dispatch.routing_is_valid,
    dispatch.send_splits_equal_receive_splits,
    dispatch.every_copy_is_delivered_once,
    dispatch.combine_of_dispatch_is_the_sum_of_probabilities,
    forward.rollouts_are_the_same_tokens,
    forward.logits_match_the_reference,
    forward.log_probs_match_the_reference,
    forward.values_and_scores_match_the_reference,
    advantages.rewards_and_returns_match_a_closed_form,
    advantages.advantages_are_whitened_over_the_whole_batch,
    forward.ratio_is_one_before_the_first_step,
    sharded.every_element_has_one_owner,
    updates.gradients_match_the_reference,
    updates.gradient_norm_is_that_of_the_observed_gradients,
    updates.gradient_norm_matches_the_reference,
    updates.zeros_of_gradients_are_counted,
    updates.the_optimizer_does_its_formula,
    updates.weights_and_moments_match_the_reference,
    state.expert_biases_are_the_same_on_all_ranks,
    updates.expert_biases_follow_the_load,
    updates.later_mini_batches_move,
    state.replicas_are_bitwise_identical,
    state.rows_are_the_same_on_model_parallel_ranks,
    updates.metrics_agree_on_all_ranks,
    updates.metrics_match_the_reference,
    state.reference_and_reward_models_never_change,
)
TWIN_LAWS = (
    twins.a_case_run_twice_is_bitwise_the_same,
    twins.switches_that_must_not_matter_do_not,
    twins.the_dispatchers_agree,
)
LIVENESS: tuple[Law, ...] = (
    liveness.collectives_run_in_lock_step,
    liveness.every_rank_finishes,
    liveness.tensors_are_left_alone_while_sent,
)
NAMES = tuple(law.__name__ for law in (*LIVENESS, *LAWS, *TWIN_LAWS))


def judge(
    case: Case, ranks: Sequence[Observation], reference: Observation, twin: Sequence[Observation] = ()
) -> tuple[Mapping[str, int], Violation | None]:
    """How much each law had to check, and the first Violation in causal order, which names the later ones."""
    counts: dict[str, int] = {}
    found: list[Violation] = []
    for seen in (ranks, twin):
        for law in LIVENESS if seen else ():
            _try(counts, found, law, case, seen, reference)
    if not found:
        ranks, twin = sharded.whole(case, ranks), sharded.whole(case, twin)
        for law in LAWS:
            _try(counts, found, law, case, ranks, reference)
        for relation in TWIN_LAWS if twin else ():
            _try(counts, found, relation, case, ranks, twin, reference)
    if found:
        found[0].also = tuple(violation.law for violation in found[1:])
    return counts, found[0] if found else None


def _try(counts: dict[str, int], found: list[Violation], law: Callable[..., int], *arguments: object) -> None:
    try:
        counts[law.__name__] = law(*arguments)
    except Violation as violation:
        found.append(violation)
    except Exception:
        if not found:
            raise  # else what an earlier law has refuted (a step never taken, an empty mask) leaves nothing to judge
