# SPDX-License-Identifier: Apache-2.0
"""`python -m pgxport` is `pgx`."""

from pgxport.cli import main

main()
