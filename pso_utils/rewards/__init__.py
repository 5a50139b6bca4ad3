"""Rewards: what samples are scored by, and how scores become pairs.

A reward is a callable `(images, prompts) -> scores`: a list of RGB PIL images, a list of strings, and one finite number
for each image, as a float tensor [B] or anything that `torch.as_tensor` makes one of. To add one to the names that
`--reward` knows, write a factory that makes it and register that:

    @register_reward("darkness")
    def darkness(model, cache_dir):
        return lambda images, prompts: [-ImageStat.Stat(image.convert("L")).mean[0] for image in images]

A reward in a file of one's own needs no registration: `--reward my_module:my_function`.
"""
# ruff: noqa: F401  (the public names, and the modules that register rewards)

from pso_utils.rewards import aesthetic, jpeg
from pso_utils.rewards.clip import CLIPImages, CLIPReward
from pso_utils.rewards.pairs import COMBINATIONS, PairSelection, score_metrics, select_pairs, within_group_deviation
from pso_utils.rewards.registry import Reward, Rewards, RewardSpec, load_rewards, parse_rewards, register_reward
