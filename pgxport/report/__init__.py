# SPDX-License-Identifier: Apache-2.0
"""Accuracy against latency: samples with known answers, the metrics that judge them, and how sure their means are."""
