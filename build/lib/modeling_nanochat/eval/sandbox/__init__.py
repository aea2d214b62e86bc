"""Runs functions that nobody has read, and says whether they pass their tests.

    judge  =>  outside  =>  inside  =>  the candidate
    (evaluation)  (the tests)  (zygote)  (a fork of it)

`judge` hands cases to worker processes. A worker (`outside`) runs the tests, which come from the data set and are
trusted. What they call as `candidate` is a stand-in: it sends the arguments to the real function, in a process that is
shut in, and gets the result back, both as text that can spell literals only (`literals`). So nothing on the inside can
touch the verdict. The inside is forked for each candidate from one warm interpreter without privileges, files, network
or other processes (`confine`), whose system calls are filtered (`seccomp`). `attacks` are tried before every use.

Both processes are bare interpreters that are started by path (`bare`): everything here needs only the standard library,
and imports within the folder are relative.
"""
