"""For every planted bug a small case that shows it, and the law that must be the first to be broken. Plain data."""

from dataclasses import replace

from fuzz.case import Case
from fuzz.laws import Law, advantages, dispatch, forward, liveness, sharded, state, twins, updates
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

EP = Layout(world=2, ep=2)
DP = Layout(world=2)
PP = Layout(world=2, pp=2)
TP = Layout(world=2, tp=2, etp=2)
GATHER = Switches(dispatcher="allgather")
HEADS = MoEModel(heads=2, kv_heads=2)
TOP2 = MoEModel(experts=3, top_k=2, norm_topk_prob=True)
FOUR = MoEModel(experts=4, top_k=2, norm_topk_prob=True)
BIASED = MoEModel(experts=3, top_k=2, norm_topk_prob=True, score="sigmoid", expert_bias=0.5, bias_rate=0.5)
GROUPED = replace(FOUR, expert_groups=2, group_topk=1)
DROPPING = MoEModel(experts=3, top_k=2, norm_topk_prob=True, capacity=0.5)
LONG = Batch(prompt=4, response=2)
ROW = Batch(prompt=2, response=3)
ROWS = Batch(rows=2, prompt=3, response=3)
RAGGED = Batch(rows=2, prompt=4, response=4, raggedness="one_long")
HOLES = Batch(rows=6, prompt=2, response=5, holes=True)
WARM = PPO(temperature=1.6)
TWO_STEPS = PPO(mini_batches=2, lr=0.3, critic_lr=0.3)

PLANTED: dict[str, tuple[Case, Law]] = {
    # ---- dispatch
    "dispatch:gates_softmaxed_before_top_k": (Case(model=TOP2), dispatch.routing_is_valid),
    "dispatch:gate_of_top_1_is_one": (Case(), dispatch.routing_is_valid),
    "dispatch:weakest_experts_chosen": (Case(), dispatch.routing_is_valid),
    "dispatch:expert_biases_in_the_gates": (Case(model=BIASED), dispatch.routing_is_valid),
    "dispatch:groups_scored_by_their_best_expert": (
        Case(model=GROUPED, batch=Batch(rows=4, prompt=3)),
        dispatch.routing_is_valid,
    ),
    "dispatch:scaling_of_pre_softmax_alone": (Case(model=replace(TOP2, scaling=2.5)), dispatch.routing_is_valid),
    "dispatch:strongest_copies_dropped": (Case(model=DROPPING, batch=LONG, seed=1), dispatch.routing_is_valid),
    "dispatch:capacity_without_top_k": (Case(model=DROPPING, batch=LONG, seed=1), dispatch.routing_is_valid),
    "dispatch:first_copies_dropped": (
        Case(model=replace(DROPPING, drops="position"), batch=LONG),
        dispatch.routing_is_valid,
    ),
    "dispatch:sinkhorn_ends_after_one_round": (
        Case(model=MoEModel(experts=5, sinkhorn=True, skew=2.0), batch=Batch(rows=4, prompt=6, response=4)),
        updates.gradients_match_the_reference,
    ),
    "dispatch:chunks_restored_by_the_wrong_shape": (
        Case(layout=Layout(world=4, ep=2, etp=2), model=FOUR, batch=Batch(rows=4, prompt=3)),
        dispatch.combine_of_dispatch_is_the_sum_of_probabilities,
    ),
    "dispatch:chunks_not_sorted_by_expert": (
        Case(layout=EP, model=FOUR, batch=ROWS),
        dispatch.every_copy_is_delivered_once,
    ),
    "dispatch:splits_overwritten_by_combine": (
        Case(layout=EP, batch=ROWS),
        dispatch.send_splits_equal_receive_splits,
    ),
    "dispatch:combine_overwrites_copies": (
        Case(model=TOP2),
        dispatch.combine_of_dispatch_is_the_sum_of_probabilities,
    ),
    "dispatch:probabilities_detached_across_ep": (
        Case(layout=EP, model=FOUR, batch=ROWS),
        updates.gradients_match_the_reference,
    ),
    "dispatch:gathered_probabilities_detached": (
        Case(layout=EP, model=FOUR, batch=ROWS, twin="other_dispatcher"),
        twins.the_dispatchers_agree,
    ),
    "dispatch:last_gathered_token_lost": (
        Case(layout=EP, batch=ROWS, switches=GATHER),
        dispatch.every_copy_is_delivered_once,
    ),
    "dispatch:probabilities_of_other_ranks_lost": (
        Case(layout=EP, batch=ROWS, switches=GATHER),
        dispatch.combine_of_dispatch_is_the_sum_of_probabilities,
    ),
    "dispatch:forward_passes_count_tokens": (Case(), state.forward_passes_change_nothing),
    # ---- layers
    "layers:gelu_of_tanh": (Case(model=MoEModel(activation="gelu")), forward.logits_match_the_reference),
    "layers:gates_clamped_from_below": (Case(model=MoEModel(clamp=0.1)), forward.logits_match_the_reference),
    "layers:offset_on_the_gate": (Case(model=MoEModel(glu_offset=-0.25)), forward.logits_match_the_reference),
    "layers:biases_of_experts_without_gates": (Case(model=MoEModel(biases=True)), forward.logits_match_the_reference),
    "layers:router_without_its_bias": (Case(model=MoEModel(biases=True)), dispatch.routing_is_valid),
    "layers:outputs_gated_twice": (Case(model=MoEModel(output_gate=True)), forward.logits_match_the_reference),
    "layers:sinks_without_a_gradient": (
        Case(model=MoEModel(sinks="learnable")),
        updates.gradients_match_the_reference,
    ),
    "layers:scores_of_deeper_layers_too_large": (
        Case(model=MoEModel(layers=2), batch=LONG, switches=Switches(qk_scaling=True)),
        forward.logits_match_the_reference,
    ),
    "layers:overlapped_gates_detached": (
        Case(
            model=MoEModel(family="qwen2moe", heads=2, kv_heads=2, shared_ffn=4),
            switches=Switches(shared_overlap=True),
        ),
        updates.gradients_match_the_reference,
    ),
    # ---- gradients
    "gradients:expert_gradients_scaled_twice": (Case(layout=EP, batch=ROWS), updates.gradients_match_the_reference),
    "gradients:expert_gradients_not_reduced": (
        Case(layout=Layout(world=4, ep=2), batch=Batch(rows=4, prompt=3)),
        updates.gradients_match_the_reference,
    ),
    "gradients:balance_gradients_not_averaged": (
        Case(model=MoEModel(aux_loss=1.0), batch=ROWS),
        updates.gradients_match_the_reference,
    ),
    "gradients:expert_biases_of_the_own_load": (
        Case(layout=DP, model=replace(BIASED, experts=5), batch=Batch(rows=2, prompt=3)),
        state.expert_biases_are_the_same_on_all_ranks,
    ),
    "gradients:expert_biases_follow_the_crowd": (
        Case(model=BIASED, batch=ROWS),
        updates.expert_biases_follow_the_load,
    ),
    "gradients:sequence_losses_added_up": (
        Case(model=MoEModel(seq_aux_loss=1.0), batch=Batch(rows=2, prompt=3, micro_rows=2)),
        updates.gradients_match_the_reference,
    ),
    "gradients:global_load_of_one_micro_batch": (
        Case(model=MoEModel(experts=3, global_aux_loss=1.0), batch=Batch(rows=3, prompt=3)),
        updates.gradients_match_the_reference,
    ),
    "gradients:z_loss_not_divided_by_tp": (
        Case(layout=TP, model=MoEModel(heads=2, kv_heads=2, z_loss=0.1), batch=ROW),
        updates.gradients_match_the_reference,
    ),
    "gradients:z_loss_on_probabilities": (
        Case(model=MoEModel(z_loss=0.1)),
        updates.gradients_match_the_reference,
    ),
    "gradients:predicted_logit_in_every_shard": (
        Case(layout=TP, model=HEADS),
        updates.gradients_match_the_reference,
    ),
    "gradients:norm_gradients_not_summed_over_tp": (
        Case(layout=TP, model=HEADS),
        updates.gradients_match_the_reference,
    ),
    "gradients:router_gradient_not_summed_over_tp": (
        Case(layout=TP, model=HEADS, batch=ROW),
        updates.gradients_match_the_reference,
    ),
    "gradients:expert_norm_over_the_dense_group": (
        Case(layout=EP, batch=ROWS),
        updates.gradient_norm_is_that_of_the_observed_gradients,
    ),
    "gradients:norm_summed_from_the_own_part_on": (
        Case(layout=EP, batch=ROWS, ppo=PPO(max_norm=0.05)),
        state.replicas_are_bitwise_identical,
    ),
    "gradients:gradients_not_zeroed": (Case(batch=ROWS, ppo=TWO_STEPS), updates.gradients_match_the_reference),
    "gradients:only_experts_are_clipped": (
        Case(layout=EP, batch=ROWS, ppo=PPO(max_norm=0.05)),
        updates.the_optimizer_does_its_formula,
    ),
    "gradients:vectors_are_decayed": (Case(ppo=PPO(weight_decay=1.0)), updates.the_optimizer_does_its_formula),
    "gradients:adam_without_bias_correction": (
        Case(batch=ROWS, ppo=PPO(mini_batches=2, optimizer="adam", eps=1e-2)),
        updates.the_optimizer_does_its_formula,
    ),
    "gradients:critic_learns_at_the_actors_rate": (
        Case(ppo=PPO(lr=0.3, critic_lr=0.1)),
        updates.the_optimizer_does_its_formula,
    ),
    # ---- PPO: rollout, log-probs, values, advantages
    "ppo_arithmetic:sampled_without_temperature": (
        Case(batch=Batch(rows=4, prompt=2, response=5), ppo=WARM),
        forward.rollouts_are_the_same_tokens,
    ),
    "ppo_arithmetic:end_tokens_are_not_trained": (
        Case(batch=Batch(rows=4, response=5, pad_is_eos=True)),
        forward.rollouts_are_the_same_tokens,
    ),
    "ppo_arithmetic:observed_tokens_are_trained": (Case(batch=HOLES), forward.rollouts_are_the_same_tokens),
    "ppo_arithmetic:log_probs_without_temperature": (Case(ppo=WARM), forward.log_probs_match_the_reference),
    "ppo_arithmetic:labels_are_not_shifted": (Case(batch=ROW), forward.log_probs_match_the_reference),
    "ppo_arithmetic:update_without_temperature": (Case(ppo=WARM), forward.ratio_is_one_before_the_first_step),
    "ppo_arithmetic:rows_not_put_back": (Case(batch=ROWS), forward.ratio_is_one_before_the_first_step),
    "ppo_arithmetic:log_sum_exp_from_the_own_maximum_on": (
        Case(layout=TP, model=HEADS, batch=Batch(rows=4, prompt=3, response=5)),
        state.rows_are_the_same_on_model_parallel_ranks,
    ),
    "ppo_arithmetic:values_one_late": (Case(batch=ROW), forward.values_and_scores_match_the_reference),
    "ppo_arithmetic:values_not_masked": (Case(batch=HOLES), forward.values_and_scores_match_the_reference),
    "ppo_arithmetic:scores_read_at_padding": (Case(batch=RAGGED), forward.values_and_scores_match_the_reference),
    "ppo_arithmetic:kl_penalty_is_a_bonus": (
        Case(ppo=PPO(kl_coef=0.1)),
        advantages.rewards_and_returns_match_a_closed_form,
    ),
    "ppo_arithmetic:gae_steps_through_holes": (
        Case(batch=HOLES, ppo=PPO(gamma=0.9, lam=0.6)),
        advantages.rewards_and_returns_match_a_closed_form,
    ),
    "ppo_arithmetic:whitened_per_dp_rank": (
        Case(layout=DP, batch=ROWS, ppo=PPO(whiten=True)),
        advantages.advantages_are_whitened_over_the_whole_batch,
    ),
    "ppo_arithmetic:whitening_mean_unmasked": (
        Case(batch=RAGGED, ppo=PPO(whiten=True)),
        advantages.advantages_are_whitened_over_the_whole_batch,
    ),
    # ---- PPO: losses and metrics
    "losses:entropy_is_a_penalty": (Case(ppo=PPO(entropy_coef=0.1)), updates.gradients_match_the_reference),
    "losses:policy_loss_is_a_mean_of_means": (Case(batch=RAGGED), updates.gradients_match_the_reference),
    "losses:value_loss_per_micro_batch": (Case(batch=RAGGED), updates.gradients_match_the_reference),
    "losses:value_loss_without_half": (Case(), updates.gradients_match_the_reference),
    "losses:value_clip_does_nothing": (
        Case(batch=ROWS, ppo=PPO(mini_batches=2, critic_lr=0.3, value_clip=0.01)),
        updates.gradients_match_the_reference,
    ),
    "losses:new_log_probs_reported_from_the_old": (
        Case(batch=ROWS, ppo=TWO_STEPS),
        updates.later_mini_batches_move,
    ),
    "losses:clip_fraction_is_always_zero": (
        Case(batch=ROWS, ppo=PPO(mini_batches=2, lr=0.3, clip_eps=0.01)),
        updates.metrics_match_the_reference,
    ),
    "losses:metrics_of_the_own_rank": (Case(layout=DP, batch=ROWS), updates.metrics_agree_on_all_ranks),
    "losses:one_epoch_whatever_is_asked": (Case(ppo=PPO(epochs=2)), state.everything_asked_for_is_done),
    # ---- state
    "state:dp_rank_from_the_expert_group": (Case(layout=DP, batch=ROWS), forward.rollouts_are_the_same_tokens),
    "state:embeddings_rounded_where_handed_in": (
        Case(twin="plain_switches", switches=Switches(decoder_input=True)),
        twins.switches_that_must_not_matter_do_not,
    ),
    "state:data_before_tensor_in_the_order": (
        Case(layout=Layout(world=4, tp=2, etp=2), model=HEADS, batch=ROWS),
        state.ranks_sit_where_the_order_says,
    ),
    "state:data_group_without_context_parallelism": (
        Case(layout=Layout(world=2, cp=2, ep=2), batch=ROW),
        state.every_group_is_what_the_order_says,
    ),
    "state:layers_numbered_from_1_on_every_stage": (
        Case(layout=Layout(world=2, pp=2), model=MoEModel(layers=2)),
        state.every_layer_is_there_once,
    ),
    "state:rotary_base_of_another_family": (
        Case(batch=Batch(prompt=4)),
        forward.logits_match_the_reference,
    ),
    "state:reference_follows_the_actor": (Case(), state.reference_and_reward_models_never_change),
    "state:critic_edits_the_reward_head": (Case(), state.reference_and_reward_models_never_change),
    "state:rewards_centred_by_earlier_batches": (Case(twin="again"), twins.a_case_run_twice_is_bitwise_the_same),
    # ---- reduction
    "reduction:every_rank_updates_the_first_share": (
        Case(layout=DP, batch=ROWS, ppo=PPO(optimizer="adam"), switches=Switches(distributed=True)),
        sharded.every_element_has_one_owner,
    ),
    "reduction:gathered_weights_not_waited_for": (
        Case(
            layout=DP,
            batch=Batch(rows=4, prompt=3, response=3),
            ppo=PPO(optimizer="adam", mini_batches=2),
            switches=Switches(distributed=True, overlap_reduce=True, overlap_gather=True),
        ),
        updates.gradients_match_the_reference,
    ),
    "reduction:zeros_of_replicas_counted": (
        Case(layout=replace(TP, etp=1), model=HEADS, switches=Switches(count_zeros=True)),
        updates.zeros_of_gradients_are_counted,
    ),
    # ---- liveness
    "liveness:generation_ends_with_the_own_rows": (
        Case(layout=EP, batch=Batch(rows=2, response=4, raggedness="one_long")),
        liveness.collectives_run_in_lock_step,
    ),
    "liveness:first_rank_alone_reduces": (Case(layout=DP, batch=ROWS), liveness.collectives_run_in_lock_step),
    "liveness:experts_without_tokens_leave_the_graph": (
        Case(layout=EP, model=MoEModel(skew=10.0), batch=ROWS),
        liveness.collectives_run_in_lock_step,
    ),
    "liveness:norm_of_starved_experts_not_reduced": (
        Case(layout=EP, batch=ROWS),
        liveness.collectives_run_in_lock_step,
    ),
    "liveness:stages_disagree_about_the_optimizer_of_experts": (
        Case(layout=Layout(world=4, ep=2, pp=2), model=MoEModel(layers=2, dense=(0,), dense_ffn=2), batch=ROWS),
        liveness.collectives_run_in_lock_step,
    ),
    "liveness:critic_shares_its_embeddings": (
        Case(layout=PP, model=MoEModel(layers=2)),
        liveness.collectives_run_in_lock_step,
    ),
    "liveness:balance_log_as_long_as_the_own_stage": (
        Case(layout=PP, model=MoEModel(layers=2, dense=(0,), dense_ffn=2)),
        liveness.collectives_run_in_lock_step,
    ),
    "liveness:stage_without_layers_raises": (
        Case(layout=replace(PP, split="list", stages=(0, 1))),
        liveness.every_rank_finishes,
    ),
    "liveness:starved_expert_raises": (Case(), liveness.every_rank_finishes),
    "liveness:sent_tensors_are_reused": (
        Case(layout=Layout(world=2, pp=2), model=MoEModel(layers=2), batch=ROWS),
        liveness.tensors_are_left_alone_while_sent,
    ),
    "liveness:last_rank_is_killed": (Case(layout=DP, batch=ROWS), liveness.every_rank_finishes),
}
