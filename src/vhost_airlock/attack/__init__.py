# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock attack`: hostile guests, VMMs and back-ends against any program.

`guest_chains`, `guest_requests` and `guest_races` have the attacks of a guest, `vmm`
and `vmm_log` those of a front-end, `back_rings` and `back_messages` those of a
back-end.
`front_judge` and `back_judge` run them and judge the program, `report` prints the
verdicts. No code here runs inside the airlock.
"""
