"""What the ops of attention share: formula, refusals, launch, sizes.

Scores are biased as in T5 (Raffel et al., 2019, https://arxiv.org/abs/1910.10683) or by distance
(Press et al., 2021, https://arxiv.org/abs/2108.12409), capped as in Gemma 2 (2024,
https://arxiv.org/abs/2408.00118), and beside them may stand a sink (Xiao et al., 2023,
https://arxiv.org/abs/2309.17453).
"""
