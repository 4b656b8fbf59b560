"""What a lasting server keeps: files by content and a ledger of what they mean, in one state folder.

    lock                 held by the one server that uses the folder
    ledger.sqlite        updates, versions, refusals, acts of admins
    blobs/ab/ab12...     task vectors, merged vectors and engine states, named by their SHA-256
    incoming/*.part      files that are not finished
    cache/               files derived from blobs

A file is durable under its name before a row of the ledger names it, and a version is one transaction.
So a crash leaves the old version or the new one, and files that nothing names, which the next start
removes.
"""
