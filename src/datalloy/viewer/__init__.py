"""One or two run folders in, a page in the browser out: sort, filter, search, compare, overrule, export.

Only what is on the screen is read from disk as text or picture; scores and selection stay in memory as columns, some
200 bytes a sample, so that a run of a million samples answers like one of a hundred.

The price: texts are read once, in the background, into `viewer/texts.sqlite` in the run folder, about the size of the
texts twice, and reading costs what hashing the pictures costs. The traps: a page of another site can send requests to
a local server (DNS rebinding; Ray's CVE-2025-62593), and every account of a shared machine can reach its ports. So the
server listens on 127.0.0.1 alone, answers to no other host name, and gives data only to who has the token.
"""

from datalloy.viewer.server import serve

__all__ = ["serve"]
