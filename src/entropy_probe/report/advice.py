"""What to do about each diagnostic."""

from __future__ import annotations

import re

__all__ = ["ADVICE", "advice"]

NOTHING = "Nothing to do: the numbers are right as they are."

# The first pattern found in a message gives the advice. tests/report/test_advice.py fails on a message without one.
ADVICE: tuple[tuple[str, str], ...] = (
    ("log-probabilities are quantised", "Set probe.dtype to float32 and probe.autocast to off, and compare."),
    (
        "require a gradient but are not in the optimizer",
        "Fine if the trainer froze them on purpose; otherwise the optimizer was built before they were unfrozen.",
    ),
    ("sequences are reweighted", "Read the errors, which the weights enlarge; sampling from this checkpoint has none."),
    (
        "log-probabilities themselves are amiss",
        "Record the log-probability that each token was drawn with (after temperature, per token), or leave them out.",
    ),
    (
        "ids of another tokenizer",
        "Tokenize prompts and responses with this checkpoint's tokenizer, or keep the sampler's own token ids.",
    ),
    (
        "sampled at that temperature",
        "Set probe.temperature to that of sampling if it is the trainer's too; else sample again.",
    ),
    (
        "biased by what is said of the update batch",
        "Read the prediction from two batches, or sample from this checkpoint.",
    ),
    (
        "importance weights of the trainer's loss are not modelled",
        "If the trainer weights tokens by importance ratios, multiply the advantages per token by them.",
    ),
    (
        "do not fit the policy|differ from the policy's by",
        "Sample from this checkpoint at the training temperature without top_p or top_k, or let entropy-probe sample.",
    ),
    (
        "elements are not preconditioned",
        "The frozen prediction mixes Adam's geometry with the plain gradient's; a later checkpoint covers more.",
    ),
    ("of the elements is clamped to", "Raise probe.frozen_max_scale and see whether the number moves."),
    (
        "no usable second moment",
        "Normal for lora_A after the first step and for parts that were never trained; else inspect the checkpoint.",
    ),
    ("max_tokens_per_microbatch was lowered", f"{NOTHING} Set probe.max_tokens_per_microbatch to save the retries."),
    (
        "update and evaluation are the same sequences",
        "Give or sample a separate evaluation batch, or read the one-batch prediction (mode: one_batch).",
    ),
    (
        "taken as drawn with replacement",
        "Set probe.evaluation_unit to prompt if responses to one prompt were drawn together.",
    ),
    (
        "equal prompts are one",
        "Right where a data set holds a prompt several times. Set probe.merge_equal_prompts to false where ids with "
        "equal tokens are different prompts (images, say).",
    ),
    ("copies are drawn as they are there", "Leave copies out of the source, unless training draws from it as it is."),
    ("counts as sampled together", f"{NOTHING} Leave trajectory_ids out to count every sequence by itself."),
    (
        "follow an end token",
        "Let response_mask end with the end token: padding and the next turn's template are not the policy's.",
    ),
    (
        "no response has an end token",
        "Keep the end token that the policy sampled, in the ids and in the mask. Where stop texts end the responses "
        "instead, set generation.stop to them.",
    ),
    (
        "entropy is that of the others",
        "Read the entropy as that of the responses the trainer keeps, or give evaluation rollouts with full masks.",
    ),
    (
        "columns, .* are not used",
        f"{NOTHING} The columns that are read are in docs/rollouts.md.",
    ),
    ("exceed max_stored_gradient_gib", f"{NOTHING} Raise probe.max_stored_gradient_gib to pass over the batch once."),
    ("its own code takes the step on copies", "Use more update prompts for a sharper error; the prediction is exact."),
    (
        "se_update holds Adam's denominators fixed",
        "Trust the error from the evaluation rollouts; probe a checkpoint some steps later for both.",
    ),
    ("clipping scales the update gradient", "Compare with probe.max_grad_norm: null to see what clipping does."),
    (
        "moves the policy too far for these rollouts",
        "Probe a smaller learning rate, or set probe.on_low_ess to resample (fresh responses after the step).",
    ),
    ("rounding to the parameters' precision", "Set probe.dtype to float64 to separate rounding from the step."),
    ("scales the product of the mean gradients", "Lower probe.frozen_max_scale and see whether the number moves."),
    ("filter_zero_advantage: asked for", "Raise update.max_resampling_rounds, or give more prompts."),
    (
        "every prompt has equal rewards|every advantage is 0",
        "Compare the rewards with the responses: a reward that finds nothing to tell apart teaches nothing.",
    ),
    (
        "end at a stop text",
        "Right only if the trainer samples with the same stop texts; else leave generation.stop out.",
    ),
    (
        "here rewards get the whole text as content",
        "Make sure that the reward finds what it looks for in the whole text, thoughts included.",
    ),
    (
        "end with an assistant's turn",
        "If that turn is the reference answer, take it out of the prompt. Where the trainer lets the policy continue "
        "it (continue_final_message), give the rendered prompt as text.",
    ),
    (
        "second one was left out",
        "TRL adds the second one: set prompts.add_special_tokens to true for prompts that it tokenized as text.",
    ),
    (
        "have equal rewards, so their advantages are 0",
        "They cost memory and add nothing; set update.filter_zero_advantage to draw others in their place.",
    ),
    ("had equal rewards and were dropped", f"{NOTHING} If the trainer keeps such prompts, keep them here too."),
    (
        "hit the largest length",
        "Make sure that probe.max_completion_length is the one of training.",
    ),
    ("sampling goes on", f"{NOTHING} Where sampling takes too long, give rollouts that another engine sampled."),
    ("the batch size was lowered", f"{NOTHING} Set generation.batch_size to save the retries."),
    ("seems exchanged", "Do not use these numbers: record a manifest during training, which maps entries by name."),
    ("learning rate is 0", "Set probe.learning_rate to that of the step you ask about; a sweep has rates of its own."),
    (r"learning rate .* is above", "Make sure that the rate is meant; probe.learning_rate sets another."),
    ("exp_avg_sq is all zero", "Compare with a later checkpoint; frozen or unused parts may be left out of training."),
    ("step counts differ between parameters", "Make sure that the late starters were unfrozen on purpose."),
    ("is missing; the save may be incomplete", "Use a checkpoint that was saved to its end, or make sure of this one."),
    ("files of two saves", "Do not mix files of different saves: copy the checkpoint again."),
    (
        "whether weight decay is decoupled",
        "Right for the Trainer's AdamW; else record a manifest during training.",
    ),
    ("the adapter was trained on", "Give the base model that it was trained on, and record a manifest."),
    ("no direct curvature", "Read the curvature from the fit."),
    (r"no log-log slope|add smaller rates", "Add smaller learning rates to the sweep."),
    ("different halves, fewer than", "Use more update prompts: few halves leave the rank correlation uncertain."),
    (
        "could not be measured and are left out",
        "Set a smaller probe.learning_rate, or probe.on_low_ess to resample (fresh responses after the step).",
    ),
    (
        "measured changes have a reliability of|do not agree at all: what ranks the steps is noise",
        "Use that many evaluation sequences (evaluation.total_sequences), or read the correlations without noise.",
    ),
    ("no rank correlation: expected", "Use more update prompts whose responses have different rewards."),
    ("are below the noise floor", "Set probe.dtype to float64, or start the sweep at a larger rate."),
)


def advice(message: str) -> str | None:
    """What to do about a message of a result, or None if nothing is known."""
    return next((remedy for pattern, remedy in ADVICE if re.search(pattern, message)), None)
