# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint: a real, trained PaliGemma 2 of 2.5 million parameters, for demos, tests and accuracy figures.

`tiny-112` and `tiny-224` are hub-layout checkpoints (bfloat16); `vae-oid.npz`
is the mask decoder in the layout of the published file; `scenes.py` draws the
pictures they were trained on, in disjoint train, calibration and test splits.

Trained on 100,000 scenes by tools/tiny/: the vision tower first, on dense labels of every patch;
then the whole on captions, signs, questions, boxes and mask codes, with several questions a
picture; last with the exact prefix mask and a learning rate that goes to zero. 224 px goes on
from 112 px with interpolated position embeddings, as the published 448 px models were made.
`<loc>` rows begin as smooth codes of their position, and their targets are Gaussians that narrow.
docs/tiny.md has the phases, the minutes and the accuracy, and says how to do it again.
"""
