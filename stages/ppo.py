"""PPO (Schulman et al. 2017; Ziegler et al. 2019). Start here.

The policy learns to write responses with a high score, at a low KL divergence from the reference it started from.
Policy, reference, critic and reward model are adapters (roles) on one frozen base. `run` opens them; then every update
calls three functions, in this order:
1. `sample`: the policy samples responses to a batch of prompts;
2. `judge`: reference, critic and reward sources evaluate the responses; scores and KL become rewards, and rewards
   become advantages and returns;
3. `learn`: several passes of clipped steps over that experience, policy and critic together (rollout/clipped.py).
In other files: penalties that change a score (rollout/charges.py), metrics (rollout/metrics.py), conditions that stop a
run (diagnostics/watchdog.py), and all that the training stages share (training/session.py).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from stages.checkpoint.run import read_metrics
from stages.config import AUTO, PpoConfig
from stages.diagnostics.finished import finished_tables
from stages.diagnostics.watchdog import Watchdog, add_resume_advice, alarms_in
from stages.errors import ConfigError, TrainingStopped, counted, verb_for
from stages.inputs import Inputs
from stages.maths.kl import next_kl_coef
from stages.models.tokens import PromptRow, TokenRow
from stages.results import Reporter, Result
from stages.rollout.charges import charge_scores, warn_of_spreads
from stages.rollout.clipped import ExperienceWithAdvantages, clipped_steps
from stages.rollout.critic import critic_is_ready, head_on_policy, open_critic
from stages.rollout.estimate import estimate_advantages
from stages.rollout.experience import (
    Experience,
    Rollout,
    collect_token_stats,
    role_logprobs,
    role_values,
    sample_rollout,
)
from stages.rollout.generate import ROWS_AT_ONCE, Sampling, check_engine
from stages.rollout.held_out import respond_to_held_out
from stages.rollout.metrics import summarise_rollout
from stages.rollout.reward_sources import RewardSources, check_templates
from stages.training.batching import batch_at, prompts_at, updates_in
from stages.training.devices import free_memory, peak_memory_gb, pick_device
from stages.training.language import count_targets, learn_rows
from stages.training.long_rows import prompt_encoder, prompt_limit
from stages.training.loop import before_and_after, stop_together
from stages.training.plan import Work, rollout_rows, source_shapes
from stages.training.publishing import publish_checkpoint
from stages.training.session import Session

TRY_TOKENS = 8
PTX_TOKENS = 1024


def run(config: PpoConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train a policy against a reward and publish it, with its critic, as a checkpoint."""
    session = Session("ppo", config, inputs, reporter)
    prompts, held_out, ptx = encode_rows(session)
    session.plan(work_of(config, prompts), updates_in)
    if dry_run:
        return session.describe_plan()

    session.load_base()
    check_ranks(session)
    open_roles(session)
    setup = open_setup(session, ptx)
    reporter.note(
        f"{counted(len(prompts), 'prompts')}, {counted(session.total, 'updates')}, "
        f"{session.roles.adapters['policy'].size:,} parameters in the policy"
    )
    with session.ranks.together():
        try_functions(setup, prompts[:2])
    session.train(partial(update, setup, prompts), partial(evaluate, setup, held_out))
    if not session.ranks.first:
        return session.result({})
    if session.base.native is not None and session.base.native.capture_failure is not None:
        reporter.note(f"decoding ran without CUDA graphs: {session.base.native.capture_failure}")
    setup.rewards.report_cut()
    lines = read_metrics(session.run)
    alarms = alarms_in(lines)
    last = {name: lines[-1].get(name) for name in ("reward_score", "reward_kl", "entropy")}
    metrics = {**before_and_after(lines), **last, "alarms": sorted(alarms)}
    publish_checkpoint(session, "policy", metrics, rewards=[s.checkpoint for s in inputs.rewards if s.checkpoint])
    data = {"metrics": metrics, "updates": session.total, "alarms": alarms}
    return session.result(data, finished_tables(session.run))


# --- setting up


@dataclass
class PpoSetup:
    """What every update uses: the session, and what only PPO has."""

    session: Session
    rewards: RewardSources
    sampling: Sampling
    watchdog: Watchdog
    ptx: list[TokenRow]  # demonstrations of the language-modelling loss that is mixed in

    @property
    def config(self) -> PpoConfig:
        """The run's knobs."""
        return self.session.config


def encode_rows(session: Session) -> tuple[list[PromptRow], list[PromptRow], list[TokenRow]]:
    """Prompts to train on, held-out prompts, and the demonstrations of the ptx loss, tokenised."""
    config, inputs, text, model = session.config, session.inputs, session.text, session.model
    most = prompt_limit(config, model, config.max_response_tokens)
    prompts, held_out = session.encode_split(prompt_encoder(text, config, most), "prompts", most)
    limit = min(model.context, PTX_TOKENS)
    learn = partial(text.demonstration, mask="completion", max_tokens=limit)
    ptx = session.encode(inputs.ptx, learn, "ptx rows", limit).rows
    session.check_coverage(inputs.ptx, "ptx rows")
    check_templates(inputs.rewards, text, prompts, session.reporter)
    return prompts, held_out, ptx


def work_of(config: PpoConfig, prompts: list[PromptRow]) -> Work:
    """What memory depends on, with every response at its longest."""
    response, several, parts = config.max_response_tokens, config.responses_per_prompt, config.minibatches
    at_once = config.rollout_batch_size
    at_once = ROWS_AT_ONCE[pick_device(config.device).type] if at_once == AUTO else at_once
    lengths = [len(prompt.ids) for prompt in prompts]
    mean = sum(lengths) / len(prompts)
    share = several / parts  # of a prompt's responses in a minibatch, on average
    prompt_share = 1 - (1 - 1 / parts) ** several  # probability that a minibatch has any of them, and so the prompt
    return Work(
        "ppo",
        [length + response for length in lengths],
        math.ceil(config.batch_size * several / parts),
        read=response / (mean + response),
        computed=(prompt_share * mean + share * response) / (share * (mean + response)),
        prompt=max(lengths),
        response=response,
        at_once=min(at_once, config.batch_size * several),
        repeated=several,
    )


def check_ranks(session: Session) -> None:
    """Raise ConfigError if a rank would have no prompt of an update."""
    size, ranks = session.config.batch_size, session.ranks.size
    if size < ranks:
        raise ConfigError(
            f"{counted(size, 'prompts')} per update {verb_for(size, 'are')} too few for {ranks} ranks",
            where="batch_size",
            fix=f"give at least {ranks}, or start fewer ranks",
        )


def open_roles(session: Session) -> None:
    """Add the roles and the optimisers: policy and reference start as one adapter, the critic as the reward model.

    An advantage estimator without a critic loads none; a shared critic is only a head on the policy's hidden states.
    """
    config, roles = session.config, session.roles
    session.start_role("policy")
    session.add_reference()
    trained = {"policy": roles.parameters("policy")}
    if config.advantage == "gae":
        open_critic(session)
        shared = config.critic == "shared"
        trained["critic"] = list(roles.heads["critic"].parameters()) if shared else roles.parameters("critic")
    session.optimise(**trained)
    session.progress.facts["kl_coef"] = config.kl_coef


def open_setup(session: Session, ptx: list[TokenRow]) -> PpoSetup:
    """Reward sources, sampling and watchdog of a run whose base is loaded."""
    config, model, base, engine = session.config, session.model, session.base, session.config.rollout_engine
    how = {"timeout": config.reward_timeout, "combine": config.combination, "signals": session.signals}
    rewards = RewardSources(session.inputs.rewards, session.roles, text=session.text, reporter=session.reporter, **how)
    for line in check_engine(base, engine):  # after all roles: DoRA in any of them rules the native decoder out
        session.reporter.note(line)
    at_once = rollout_rows(config, session.work, model, source_shapes(model, config), free_memory(base.device))
    return PpoSetup(
        session,
        rewards,
        Sampling(config.temperature, config.max_response_tokens, rollout_batch_size=at_once, engine=engine),
        Watchdog(
            tuple(config.stop_on),
            session.reporter,
            earlier=lambda: read_metrics(session.run)[1:],
            half_precision=base.dtype != torch.float32,
            eos_expected=config.missing_eos_penalty > 0,
        ),
        ptx,
    )


def try_functions(setup: PpoSetup, prompts: list[PromptRow]) -> None:
    """Score a few short responses, so that a broken reward function is found before anything is written."""
    if any(spec.function for spec in setup.rewards.specs):
        session = setup.session
        keys = [(setup.config.seed, "ppo", "try", i) for i in range(len(prompts))]
        sampling = replace(setup.sampling, max_tokens=min(TRY_TOKENS, setup.sampling.max_tokens))
        rollout = sample_rollout(session.roles, "policy", session.text, prompts, keys, sampling)
        setup.rewards.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended)


# --- one update


def update(setup: PpoSetup, prompts: list[PromptRow], step: int) -> dict[str, float]:
    """Make update `step`; returns its metrics. If the watchdog stops it, the state from before it is saved."""
    config = setup.config
    chosen = [prompts[i] for i in prompts_at(step, len(prompts), config.batch_size, config.seed)]
    try:
        metrics = ppo_update(setup, chosen, step)
    except TrainingStopped as stop:
        raise keep_state(setup, stop, step) from None
    return metrics | {"epoch": (step + 1) * config.batch_size / len(prompts)}


def ppo_update(setup: PpoSetup, prompts: list[PromptRow], step: int) -> dict[str, float]:
    """Sample, judge, learn, in the order of Huang et al. 2024; returns the update's metrics.

    Raises TrainingStopped if a condition of --stop-on holds: of the rollout, before anything is learned from it.
    """
    session, began = setup.session, time.perf_counter()
    with session.ranks.together():
        rollout = sample(setup, prompts, step)
    sampled = time.perf_counter()
    stop_together(session)
    judged, metrics = judge(setup, rollout, step)
    judged_at = time.perf_counter()
    setup.watchdog.stop_before_learning(step, metrics)
    metrics |= learn(setup, judged, step)
    metrics |= {
        "time_rollout": sampled - began,
        "time_experience": judged_at - sampled,
        "time_update": time.perf_counter() - judged_at,
    }
    metrics["memory_gb"] = peak_memory_gb(session.base.device)
    adapt_kl_coef(setup, metrics["reward_kl"])
    metrics["nonfinite_in_a_row"] = float(session.progress.bad_steps)
    return metrics | setup.watchdog.check_update(step, metrics)


def sample(setup: PpoSetup, prompts: list[PromptRow], step: int) -> Rollout:
    """This rank's responses, `responses_per_prompt` to each of its prompts."""
    config, session = setup.config, setup.session
    mine = session.ranks.share(list(range(len(prompts))))
    numbered = [(i, k) for i in mine for k in range(config.responses_per_prompt)]
    keys = [(config.seed, "ppo", "rollout", step, i, k) for i, k in numbered]
    repeated = [prompts[i] for i, _ in numbered]
    head = head_on_policy(config)
    return sample_rollout(session.roles, "policy", session.text, repeated, keys, setup.sampling, head=head)


def judge(setup: PpoSetup, rollout: Rollout, step: int) -> tuple[ExperienceWithAdvantages, dict[str, float]]:
    """A rollout's experience with advantages and returns, which `learn` takes; and the rollout's metrics."""
    config, session = setup.config, setup.session
    with session.ranks.together():
        experience = collect_experience(setup, rollout)
    stop_together(session)
    kl_coef = session.progress.facts["kl_coef"]
    score = charge_scores(session, experience)
    groups = torch.arange(len(score), device=score.device) // config.responses_per_prompt
    advantages, returns = estimate_advantages(config, experience, score, kl_coef, groups, session.ranks.sum)
    judged = ExperienceWithAdvantages(experience, advantages, returns, kl_coef)
    metrics = summarise_rollout(session, judged, score, groups)
    warn_of_spreads(session, setup.rewards, metrics, step)
    train_policy = critic_is_ready(session, step, metrics.get("explained_variance"))
    return replace(judged, train_policy=train_policy), metrics


def collect_experience(setup: PpoSetup, rollout: Rollout) -> Experience:
    """Log-probabilities, values and scores of a rollout, with at most one forward pass per role."""
    config, roles = setup.config, setup.session.roles
    stats, mismatch = collect_token_stats(roles, rollout, config.temperature, head=head_on_policy(config))
    if roles.alike("policy", "reference"):
        reference = stats.logprobs
    else:
        reference, _ = role_logprobs(roles, "reference", rollout, config.temperature)
    values = stats.values
    if config.advantage == "gae" and config.critic == "adapter":
        values = role_values(roles, "critic", "critic", rollout)
    scores = setup.rewards.score_by_source(rollout.prompts, rollout.responses, rollout.texts, rollout.ended)
    mask, score = (x.to(roles.base.device) for x in (rollout.mask, scores.total))
    numbers = stats.logprobs, reference, values, score, stats.entropy, mismatch
    return Experience(rollout, mask, *numbers, scores.by_source)


def learn(setup: PpoSetup, judged: ExperienceWithAdvantages, step: int) -> dict[str, float]:
    """Take the clipped steps of policy and critic, with the ptx loss if there is one; returns their metrics."""
    session = setup.session
    ptx = partial(ptx_step, setup, step) if setup.ptx else None
    return clipped_steps(session, judged, session.learning_rate(step), step, ptx)


def ptx_step(setup: PpoSetup, step: int, number: int) -> dict[str, float]:
    """Add the gradient of ptx_coef x language-modelling loss on as many demonstrations as a minibatch has prompts.

    Returns the loss of this rank's rows, to be summed over ranks. Source: PPO-ptx of Ouyang et al. 2022, eq. 2.
    """
    config, session = setup.config, setup.session
    place = (step * config.ppo_epochs * config.minibatches + number) % (2**31)
    size = max(1, config.batch_size // config.minibatches)
    batch = [setup.ptx[i] for i in batch_at(place, len(setup.ptx), size, config.seed, "ptx")]
    rows, targets = session.ranks.share(batch), count_targets(batch)
    return {"ptx_loss": learn_rows(session.roles, "policy", rows, targets, config.ptx_coef)["loss"]}


def adapt_kl_coef(setup: PpoSetup, kl: float) -> None:
    """Move kl_coef so that the KL approaches kl_target, if one is given."""
    config, facts = setup.config, setup.session.progress.facts
    if config.kl_target is not None:
        episodes = config.batch_size * config.responses_per_prompt
        facts["kl_coef"] = next_kl_coef(facts["kl_coef"], kl, config.kl_target, episodes, config.kl_horizon)


def keep_state(setup: PpoSetup, stop: TrainingStopped, step: int) -> TrainingStopped:
    """Save the state from before update `step`, if no optimiser has stepped since; returns `stop` with resume advice.

    A later stop leaves the last saved state.
    """
    session, config = setup.session, setup.config
    progress = session.progress
    if not progress.intact:
        return add_resume_advice(stop, None, config.output, config.stop_on)
    progress.go_back()
    with session.ranks.together():  # a rank that ended earlier would end the one that saves
        session.run.save_state(step, progress.tensors(), progress.stored())
    return add_resume_advice(stop, step, config.output, config.stop_on)


# --- held-out prompts


def evaluate(setup: PpoSetup, prompts: list[PromptRow], step: int) -> dict[str, float]:
    """Score, KL and length on held-out prompts, always with the same noise; a few responses go to samples.jsonl."""
    if not prompts:
        return {}
    session, ranks = setup.session, setup.session.ranks
    with ranks.together():
        columns, samples = respond_to_held_out(session, setup.rewards, setup.sampling, prompts)
    metrics = {f"eval_{name}": sum(v) / len(v) for name, v in ((n, ranks.gather(c)) for n, c in columns.items())}
    shown = ranks.gather(samples)[: setup.config.samples]
    if ranks.first:
        session.run.samples([{"step": step, **sample} for sample in shown])
    return metrics
