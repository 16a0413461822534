"""PPO (Schulman et al. 2017; Ziegler et al. 2019): four roles on one frozen base.

One update: sample responses, judge them, shape rewards, estimate advantages, and take a few clipped steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stages.config import AUTO, PpoConfig
from stages.errors import ConfigError, TrainingStopped
from stages.files.run import Run
from stages.inputs import Inputs
from stages.maths.advantages import dead_groups
from stages.maths.kl import k3, next_kl_coef, sequence_kl
from stages.maths.rewards import RunningMoments, charge_missing_eos, clip_score, length_penalty
from stages.maths.statistics import correlation, explained_variance, repeated_ngrams, shared_response_rate
from stages.models.heads import ScalarHead
from stages.models.roles import Roles, adapter_of, frozen_copy, head_of, start_adapter
from stages.models.tokens import PromptRow, Text, TokenRow
from stages.results import Reporter, Result, Table, metrics_table, next_commands
from stages.rollout.clipped import ExperienceWithAdvantages, clipped_steps
from stages.rollout.estimate import estimate_advantages
from stages.rollout.experience import (
    Experience,
    Rollout,
    collect_token_stats,
    role_logprobs,
    role_values,
    rollout_kl,
    sample_rollout,
)
from stages.rollout.generate import ROWS_AT_ONCE, Sampling, check_engine
from stages.rollout.graphs import Usable
from stages.rollout.sources import RewardSources, check_templates
from stages.rollout.watching import Watchdog, add_resume_advice, alarm_table, alarms_in
from stages.training.batching import batch_at
from stages.training.devices import Ranks, free_memory, peak_memory_gb, pick_device
from stages.training.language import count_targets, learn_rows
from stages.training.loop import Progress, before_and_after, read_metrics, stop_together, train
from stages.training.optimizer import learning_rate_at
from stages.training.plan import Work, plan_result, rollout_rows, source_shapes
from stages.training.seeds import derive, permutation
from stages.training.session import (
    check_coverage,
    encode_all,
    open_for_training,
    open_progress,
    open_text,
    publish_checkpoint,
    report_cuts,
)

TRY_TOKENS = 8
PTX_TOKENS = 1024
REPEATED_RUN, REPEATED_WITHIN = 3, 64  # tokens: runs that a response repeats, and how soon


def run(config: PpoConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train a policy against a reward and publish it, with its critic, as a checkpoint."""
    source, out = inputs.source, inputs.run
    text = open_text(source, config, reporter)
    longest = min(config.max_prompt_tokens or 2**30, source.context - config.max_response_tokens)
    encode = partial(text.prompt, max_tokens=longest)
    prompts = encode_all(inputs.train, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="prompts")
    held = encode_all(
        inputs.held_out, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="held-out prompts"
    )
    limit = min(source.context, PTX_TOKENS)
    learn = partial(text.demonstration, mask="completion", max_tokens=limit)
    ptx = encode_all(inputs.ptx, learn, skip_bad=config.skip_bad_rows, reporter=reporter, what="ptx rows")
    report_cuts(ptx, limit, reporter, "ptx rows")
    check_templates(inputs.rewards, text, prompts, reporter)
    check_coverage(text, inputs.train, reporter, what="prompts")
    check_coverage(text, inputs.ptx, reporter, what="ptx rows")
    total = config.max_steps or max(1, math.ceil(round(config.epochs * len(prompts) / config.batch_size, 6)))
    work = work_of(config, prompts)
    if dry_run:
        return plan_result(config, source, work, total, inputs.rows_left_out)

    base, ranks = open_for_training(source, config, text, work, reporter)
    for line in check_engine(base, config.rollout_engine):
        reporter.note(line)
    at_once = rollout_rows(config, work, source, source_shapes(source, config), free_memory(base.device))
    if config.batch_size < ranks.size:
        raise ConfigError(
            f"{config.batch_size} prompts per update are too few for {ranks.size} ranks",
            where="batch_size",
            fix=f"give at least {ranks.size}, or start fewer ranks",
        )
    roles = open_roles(Roles(base), config, inputs)
    rewards = RewardSources(inputs.rewards, roles, config.micro_batch_size, timeout=config.reward_timeout)
    progress = open_progress(config, trained_parameters(roles, config))
    progress.facts["kl_coef"] = config.kl_coef
    law = config.temperature, config.max_response_tokens
    sampling = Sampling(*law, rollout_batch_size=at_once, engine=config.rollout_engine)
    bench = PpoSetup(config, roles, text, rewards, ranks, progress, sampling, total, ptx)
    watch = Watchdog(
        tuple(config.stop_on),
        reporter,
        earlier=lambda: read_metrics(out)[1:],
        half_precision=base.dtype != torch.float32,
        eos_expected=config.missing_eos_penalty > 0,
    )

    def update(step: int) -> dict[str, float]:
        chosen = [prompts[i] for i in prompts_at(step, len(prompts), config.batch_size, config.seed)]
        try:
            metrics = ppo_update(bench, watch, chosen, step)
        except TrainingStopped as stop:
            raise keep_state(stop, out, progress, ranks, config, step) from None
        return metrics | {"epoch": (step + 1) * config.batch_size / len(prompts)}

    def evaluate(step: int) -> dict[str, float]:
        metrics, samples = held_out_metrics(bench, held, config.samples)
        if ranks.first:
            out.samples([{"step": step, **sample} for sample in samples])
        return metrics

    reporter.note(
        f"{len(prompts)} prompts, {total} updates, {roles.adapters['policy'].size:,} parameters in the policy"
    )
    with ranks.together():
        try_functions(bench, prompts[:2])
    train(out, reporter, ranks, progress, config, title="ppo", total=total, update=update, evaluate=evaluate)
    if not ranks.first:
        return Result("ppo", "done", config.output, {})
    if Usable.reason is not None:
        reporter.note(f"decoding ran without CUDA graphs: {Usable.reason}")
    lines = read_metrics(out)
    metrics = {**before_and_after(lines), **{k: lines[-1].get(k) for k in ("reward_score", "reward_kl", "entropy")}}
    alarms = alarms_in(lines)
    metrics["alarms"] = sorted(alarms)
    parents = [("model", source), *(("reward", spec.checkpoint) for spec in inputs.rewards if spec.checkpoint)]
    publish_checkpoint(
        out, "ppo", config, roles, text,
        adapter=roles.adapters["policy"],
        critic=(roles.adapters.get("critic"), roles.heads["critic"]) if "critic" in roles.heads else None,
        parents=parents, datasets={"train": inputs.data}, metrics=metrics, lines=lines,
    )  # fmt: skip
    data = {"metrics": metrics, "updates": total, "alarms": alarms}
    tables = (start_and_end(metrics) if held else metrics_table("ppo", metrics),)
    tables += (alarm_table(alarms, total),) if alarms else ()
    return Result("ppo", "done", config.output, data, tables, next_commands("ppo", config))


def keep_state(
    stop: TrainingStopped, out: Run, progress: Progress, ranks: Ranks, config: PpoConfig, step: int
) -> TrainingStopped:
    """Save the state from before update `step`, if it is still there, and say in the stop how to go on.

    What stops an update after its first optimiser step leaves the last saved state.
    """
    if not progress.intact:
        return add_resume_advice(stop, None, config.output, config.stop_on)
    progress.go_back()
    with ranks.together():  # a rank that left earlier would take the one that saves with it
        out.save_state(step, progress.tensors(), progress.stored())
    return add_resume_advice(stop, step, config.output, config.stop_on)


@dataclass(frozen=True)
class PpoSetup:
    """What every update works with."""

    config: PpoConfig
    roles: Roles
    text: Text
    rewards: RewardSources
    ranks: Ranks
    progress: Progress
    sampling: Sampling
    total: int
    ptx: list[TokenRow]  # demonstrations of the language-modelling loss that is mixed in

    @property
    def device(self) -> torch.device:
        return self.roles.base.device


def work_of(config: PpoConfig, prompts: list[PromptRow]) -> Work:
    """What memory depends on, with every response at its longest."""
    longest, response, several = (
        max(len(p.ids) for p in prompts),
        config.max_response_tokens,
        config.responses_per_prompt,
    )
    at_once = config.rollout_batch_size
    at_once = ROWS_AT_ONCE[pick_device(config.device).type] if at_once == AUTO else at_once
    mean = sum(len(p.ids) for p in prompts) / len(prompts)
    here = several / config.minibatches  # of a prompt's responses that are in a minibatch, and whether any is
    any_here = 1 - (1 - 1 / config.minibatches) ** several
    return Work(
        "ppo",
        [len(p.ids) + response for p in prompts],
        math.ceil(config.batch_size * several / config.minibatches),
        read=response / (mean + response),
        computed=(any_here * mean + here * response) / (here * (mean + response)),
        prompt=longest,
        response=response,
        at_once=min(at_once, config.batch_size * several),
        repeated=several,
    )


def try_functions(bench: PpoSetup, prompts: list[PromptRow]) -> None:
    """Score a few short responses, so that a reward function that cannot work is found before anything is written."""
    if any(spec.function for spec in bench.rewards.specs):
        keys = [(bench.config.seed, "ppo", "try", i) for i in range(len(prompts))]
        sampling = replace(bench.sampling, max_tokens=min(TRY_TOKENS, bench.sampling.max_tokens))
        rollout = sample_rollout(bench.roles, "policy", bench.text, prompts, keys, sampling)
        bench.rewards.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended)


# --- roles


def open_roles(roles: Roles, config: PpoConfig, inputs: Inputs) -> Roles:
    """Policy and reference start as the same adapter; the critic starts as the reward model."""
    base, source = roles.base, inputs.source
    seed = derive(config.seed, "ppo", "adapter")
    roles.add("policy", start_adapter(base, source, config, seed))
    roles.add("reference", frozen_copy(adapter_of(base, source, trainable=False)))
    if config.advantage != "gae":
        return roles  # no critic is loaded where none is used
    earlier = earlier_critic(config, inputs)
    if config.critic == "shared":
        head = ScalarHead(base.width).to(base.device) if earlier is None else head_of(base, earlier)
        roles.heads["critic"] = head.copy(trainable=True)
        return roles
    reward = next((spec.checkpoint for spec in inputs.rewards if spec.checkpoint), None)
    folder = earlier or (reward.folder if reward else None)
    if folder is None:
        roles.add("critic", roles.adapters["policy"].copy(trainable=True), ScalarHead(base.width).to(base.device))
        return roles
    adapter = adapter_of(base, source, trainable=True, folder=folder)
    roles.add("critic", adapter, head_of(base, folder).copy(trainable=True))
    return roles


def earlier_critic(config: PpoConfig, inputs: Inputs) -> Path | None:
    """The critic of the PPO checkpoint that training goes on from, where it judged by the same rewards."""
    manifest = inputs.source.manifest
    if manifest is None or manifest.stage != "ppo" or manifest.config.get("critic") != config.critic:
        return None
    judged_by = {digest for name, digest in manifest.inputs.items() if name.startswith("reward ")}
    return manifest.folder / "critic" if judged_by == {spec.digest for spec in inputs.rewards} else None


def trained_parameters(roles: Roles, config: PpoConfig) -> dict[str, list]:
    """What is trained, by the name of its optimiser; a shared critic is a head alone."""
    if config.advantage != "gae":
        return {"policy": roles.parameters("policy")}
    critic = roles.parameters("critic") if config.critic == "adapter" else list(roles.heads["critic"].parameters())
    return {"policy": roles.parameters("policy"), "critic": critic}


# --- one update


def prompts_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of an update's prompts: always a whole batch, read on across the ends of shuffled epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: permutation(n, seed, "ppo", "order", epoch) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]


def ppo_update(bench: PpoSetup, watch: Watchdog, prompts: list[PromptRow], step: int) -> dict[str, float]:
    """One PPO update, in the order of Huang et al. 2024; returns its metrics.

    Raises TrainingStopped where a watched condition says so: of the rollout, before anything is learned from it.
    """
    config, ranks = bench.config, bench.ranks
    began = time.perf_counter()
    with ranks.together():
        rollout = sample(bench, prompts, step)
    sampled = time.perf_counter()
    stop_together(ranks)
    with ranks.together():
        experience = judge(bench, rollout)
    judged_at = time.perf_counter()
    stop_together(ranks)
    kl_coef = bench.progress.facts["kl_coef"]
    score = final_score(bench, experience)
    groups = torch.arange(len(score), device=bench.device) // config.responses_per_prompt
    advantages, returns = estimate_advantages(config, experience, score, kl_coef, groups, ranks.sum)
    metrics = summarise_rollout(bench, experience, score, returns, kl_coef, groups)
    watch.stop_before_learning(step, metrics)
    rate = learning_rate_at(step, bench.total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
    judged = ExperienceWithAdvantages(
        experience, advantages, returns, kl_coef, train_policy=step >= config.critic_warmup
    )
    learned_from = time.perf_counter()
    also = partial(language_step, bench, step)
    metrics |= clipped_steps(config, bench.roles, ranks, bench.progress, judged, rate, step, also)
    metrics["time_rollout"] = sampled - began
    metrics["time_experience"] = judged_at - sampled
    metrics["time_update"] = time.perf_counter() - learned_from
    metrics["memory_gb"] = peak_memory_gb(bench.device)
    if config.kl_target is not None:
        episodes = config.batch_size * config.responses_per_prompt
        bench.progress.facts["kl_coef"] = next_kl_coef(
            kl_coef, metrics["reward_kl"], config.kl_target, episodes, config.kl_horizon
        )
    metrics["nonfinite_in_a_row"] = float(bench.progress.bad_steps)
    return metrics | watch.check_update(step, metrics)


def sample(bench: PpoSetup, prompts: list[PromptRow], step: int) -> Rollout:
    """This rank's responses, `responses_per_prompt` to each prompt."""
    config = bench.config
    numbered = [
        (i, k) for i in bench.ranks.share(list(range(len(prompts)))) for k in range(config.responses_per_prompt)
    ]
    keys = [(config.seed, "ppo", "rollout", step, i, k) for i, k in numbered]
    asked = [prompts[i] for i, _ in numbered]
    return sample_rollout(bench.roles, "policy", bench.text, asked, keys, bench.sampling, head=head_on_policy(config))


def head_on_policy(config: PpoConfig) -> str | None:
    """The critic's head where it reads the policy's own states."""
    return "critic" if config.advantage == "gae" and config.critic == "shared" else None


def judge(bench: PpoSetup, rollout: Rollout) -> Experience:
    """What policy, reference, critic and reward say of a rollout, in one pass each at most."""
    config, roles, device = bench.config, bench.roles, bench.device
    how = rollout, config.temperature, config.micro_batch_size
    known, mismatch = collect_token_stats(roles, *how, head=head_on_policy(config))
    at_start = roles.alike("policy", "reference")
    reference = known.logprobs if at_start else role_logprobs(roles, "reference", *how)[0]
    values = known.values
    if config.advantage == "gae" and config.critic == "adapter":
        values = role_values(roles, "critic", "critic", rollout, config.micro_batch_size)
    score = bench.rewards.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended).to(device)
    mask = rollout.mask.to(device)
    return Experience(rollout, mask, known.logprobs, reference, values, score, known.entropy, mismatch)


def final_score(bench: PpoSetup, experience: Experience) -> Tensor:
    """Scores (B,) as they enter the rewards: normalised, charged for length and for a missing end, then clipped."""
    config, score = bench.config, experience.score
    if config.normalise_scores:
        score = normalise(bench, score)
    if config.length_penalty:
        lengths = experience.mask.sum(dim=1)
        score = score - length_penalty(lengths, config.length_limit, config.length_penalty)
    ended = experience.rollout.ended.to(score.device)
    how = charge_of(bench, ended) if config.missing_eos == AUTO else config.missing_eos
    score = charge_missing_eos(score, ended, config.missing_eos_penalty, how)
    return score if config.score_clip is None else clip_score(score, config.score_clip)


def normalise(bench: PpoSetup, score: Tensor) -> Tensor:
    """Scores (B,) by the running mean and spread of all that were seen, these included."""
    facts = bench.progress.facts
    names = ("scores_count", "scores_mean", "scores_m2")
    moments = RunningMoments(*(facts.get(name, 0.0) for name in names)).updated(score, bench.ranks.sum)
    facts |= dict(zip(names, (moments.count, moments.mean, moments.m2), strict=True))
    return moments.normalise(score)


def charge_of(bench: PpoSetup, ended: Tensor) -> str:
    """What `missing_eos` auto means for this run, decided by its first rollout.

    A floor keeps a policy that ends its responses from giving that up for a higher score. Where responses do not end
    anyway, because the text goes on beyond max_response_tokens, a floor would leave nothing of the score to learn from.
    """
    facts = bench.progress.facts
    if "responses_end" not in facts:
        counts = bench.ranks.sum_floats({"ended": float(ended.sum()), "all": float(len(ended))}, bench.device)
        facts["responses_end"] = float(counts["ended"] >= 0.5 * counts["all"])
    return "floor" if facts["responses_end"] else "subtract"


def language_step(bench: PpoSetup, step: int, number: int) -> dict[str, float]:
    """Add the gradient of ptx_coef x language-modelling loss on as many demonstrations as a minibatch has prompts.

    Returns the loss of this rank's rows, to be summed over ranks. Source: PPO-ptx of Ouyang et al. 2022, eq. 2.
    """
    config, ranks = bench.config, bench.ranks
    if not bench.ptx:
        return {}
    place = (step * config.ppo_epochs * config.minibatches + number) % (2**31)
    size = max(1, config.batch_size // config.minibatches)
    batch = [bench.ptx[i] for i in batch_at(place, len(bench.ptx), size, config.seed, "ptx")]
    rows, tokens = ranks.share(batch), count_targets(batch)
    with bench.roles.use("policy"):
        return {"ptx_loss": learn_rows(bench.roles, rows, tokens, config.micro_batch_size, config.ptx_coef)}


def summarise_rollout(
    bench: PpoSetup, experience: Experience, score: Tensor, returns: Tensor, kl_coef: float, groups: Tensor
) -> dict[str, float]:
    """What is worth knowing of a rollout, over all ranks."""
    rollout, mask = experience.rollout, experience.mask
    critic, grouped = bench.config.advantage == "gae", bench.config.responses_per_prompt > 1
    kl = sequence_kl(experience.logprobs, experience.reference_logprobs, mask)
    repeats = [repeated_ngrams(r.tolist(), REPEATED_RUN, REPEATED_WITHIN) for r in rollout.responses]
    each = {
        "score": experience.score.tolist(),
        "charged": score.tolist(),
        "kl": kl.tolist(),
        "k3": k3(experience.logprobs, experience.reference_logprobs).masked_fill(~mask, 0).sum(-1).tolist(),
        "entropy": experience.entropy.masked_fill(~mask, 0).sum(-1).tolist(),
        "length": [float(n) for n in rollout.lengths],
        "ended": rollout.ended.double().tolist(),
        "tokens": [float(n) for n in rollout.sizes],
        "repeated": [float(repeated) for repeated, _ in repeats],
        "runs": [float(runs) for _, runs in repeats],
    }
    asked = [hash(tuple(p.ids.tolist())) for p in rollout.prompts]  # integers hash alike everywhere
    rows = [list(row) for row in zip(rollout.texts, asked, *each.values(), strict=True)]
    texts, asked, *columns = zip(*bench.ranks.gather(rows), strict=True)
    all_ranks = {name: torch.tensor(column, dtype=torch.float64) for name, column in zip(each, columns, strict=True)}
    mean = {name: float(values.mean()) for name, values in all_ranks.items()}
    return {
        "reward_score": mean["score"],
        "reward_score_std": float(all_ranks["score"].std(unbiased=False)),
        "reward_kl": mean["kl"],
        "reward_kl_std": float(all_ranks["kl"].std(unbiased=False)),
        "reward_total": mean["charged"] - kl_coef * mean["kl"],
        "kl_k3": mean["k3"],
        "kl_coef": kl_coef,
        "entropy": float(all_ranks["entropy"].sum() / all_ranks["length"].sum()),
        "response_length": mean["length"],
        "eos_rate": mean["ended"],
        "truncated_rate": 1 - mean["ended"],
        "duplicate_rate": 1 - len(set(texts)) / len(texts),
        "shared_response_rate": shared_response_rate(texts, asked),
        "repetition_rate": float(all_ranks["repeated"].sum() / all_ranks["runs"].sum().clamp(min=1)),
        "score_length_corr": correlation(all_ranks["score"], all_ranks["length"]),
        **({"explained_variance": measure_explained_variance(bench, experience, returns)} if critic else {}),
        **({"dead_group_rate": dead_groups(score, groups, bench.ranks.sum)} if grouped else {}),
        "sampling_mismatch": bench.ranks.max(experience.mismatch, bench.device),
        "tokens": float(all_ranks["tokens"].sum()),
        "samples": float(len(texts)),
    }


def measure_explained_variance(bench: PpoSetup, experience: Experience, returns: Tensor) -> float:
    """How much of the returns' variance the critic foresaw, over the tokens of all ranks."""
    of_tokens = (x[experience.mask].tolist() for x in (experience.values, returns))
    values, goals = (torch.tensor(bench.ranks.gather(numbers), dtype=torch.float64) for numbers in of_tokens)
    return explained_variance(values, goals, torch.ones_like(values, dtype=torch.bool))


# --- held-out prompts


def held_out_metrics(bench: PpoSetup, prompts: list[PromptRow], shown: int) -> tuple[dict[str, float], list[dict]]:
    """Score, KL to the reference and length on held-out prompts, sampled with the same noise every time."""
    if not prompts:
        return {}, []
    config, roles, ranks = bench.config, bench.roles, bench.ranks
    mine = ranks.share(list(range(len(prompts))))
    keys = [(config.seed, "ppo", "held-out", i) for i in mine]
    metrics: dict[str, list[float]] = {name: [] for name in ("score", "kl", "length", "eos_rate")}
    samples: list[dict] = []
    with ranks.together():
        if mine:
            rollout = sample_rollout(roles, "policy", bench.text, [prompts[i] for i in mine], keys, bench.sampling)
            experience_kl = rollout_kl(roles, rollout, config.temperature, config.micro_batch_size)
            score = bench.rewards.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended).tolist()
            lengths = [float(n) for n in rollout.lengths]
            columns = (score, experience_kl.tolist(), lengths, rollout.ended.double().tolist())
            metrics = dict(zip(metrics, columns, strict=True))
            samples = [
                {"prompt": p.text, "response": t, "score": s, "where": p.where}
                for p, t, s in zip(rollout.prompts, rollout.texts, score, strict=True)
            ]
    gathered = {name: ranks.gather(values) for name, values in metrics.items()}
    return {f"eval_{name}": sum(v) / len(v) for name, v in gathered.items()}, ranks.gather(samples)[:shown]


def start_and_end(metrics: dict[str, float]) -> Table:
    """Held-out numbers before the first update and after the last."""
    names = {"score": "score", "kl": "KL to the reference", "length": "response length", "eos_rate": "ended by itself"}
    rows = tuple(
        (label, f"{metrics[f'eval_{name}_before']:.4g}", f"{metrics[f'eval_{name}']:.4g}")
        for name, label in names.items()
        if f"eval_{name}_before" in metrics
    )
    return Table("ppo on held-out prompts", ("measure", "start", "end"), rows)
