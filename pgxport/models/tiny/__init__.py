# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint: a real, trained PaliGemma 2 of 2.5 million parameters, for demos, tests and accuracy figures.

`tiny-112` and `tiny-224` are hub-layout checkpoints (bfloat16); `vae-oid.npz` is the mask decoder in the layout of the
published file; `scenes.py` draws the pictures they were trained on. docs/tiny.md says how it was trained and what it reaches.
"""
