"""One model on several devices: each process has some heads of every layer, and some columns of its MLP.

The engine's own process is the leader, rank 0: it alone schedules, samples and knows of requests. It tells the workers
over sockets what to do (`commands`), and they do as it does, each to its share of the weights and of every state row.
Tensors cross between them by torch.distributed: two sums a layer, and a state row where it leaves or enters the pool.
"""
