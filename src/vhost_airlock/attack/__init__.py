# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock attack`: hostile guests, VMMs and back-ends against any program.

`guest_chains`, `guest_requests` and `guest_races` hold what a guest can do with a ring,
`vmm` what a front-end can say, `back_rings` and `back_messages` what a back-end can do.
`front_judge` and `back_judge` run them and find out what held, `report` tells it.
Nothing of this runs inside the airlock.
"""
