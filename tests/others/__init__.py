"""Other programs that write nat rules, beside snatd: the very programs, as Debian packages them.

kube-proxy and flanneld are in no package: what they write is typed, after their sources.
"""
