"""Verify, measured on bugs that it was not made from: independent implementations with one bad line at a time.

``python -m tests.seeded`` prints what is caught and what is named. Of npattn only the public names of `npattn.verify` are used.
In each implementation ``bug`` names the line that is wrong; without one it is right.
"""
