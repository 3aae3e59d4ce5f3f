"""Your own PyTorch model on a cut sequence: four calls, and the gradients equal one process.

    torchrun --nproc-per-node 2 examples/own_model.py
    python examples/own_model.py                      # the same numbers, on one rank
"""

import torch
from torch import nn
from torch.nn import functional as F

import lss


class Model(nn.Module):
    """One attention layer over bytes; everything but attention and loss is local to a token."""

    def __init__(self, mesh, seq_len):
        super().__init__()
        self.mesh, self.seq_len = mesh, seq_len
        self.embed, self.place = nn.Embedding(256, 64), nn.Embedding(seq_len, 64)
        self.qkv, self.out, self.head = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 256)

    def forward(self, tokens, positions):
        x = self.embed(tokens) + self.place(positions)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).unbind(2)
        x = x + self.out(lss.attention(q, k, v, mesh=self.mesh, seq_len=self.seq_len).flatten(-2))
        return self.head(F.relu(x))


mesh = lss.init_mesh(cp=lss.world_size())
text = torch.tensor([list((__doc__ * 9)[:1001].encode())])
tokens, labels = text[:, :-1], text[:, 1:]  # labels are shifted before the cut
seg = lss.make_segment(tokens.shape[1], mesh)

torch.manual_seed(0)  # the same weights on every rank
model = Model(mesh, tokens.shape[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
positions = seg.positions.clamp(max=tokens.shape[1] - 1)  # padding may look up any row: it is never counted
for step in range(1, 31):
    optimizer.zero_grad()
    logits = model(lss.shard(tokens, mesh, seg=seg, pad_value=0), positions)
    loss = lss.cross_entropy(logits, lss.shard(labels, mesh, seg=seg), mesh)  # global mean, on every rank
    loss.backward()
    lss.sum_gradients(model.parameters(), mesh)  # sums, no averages
    optimizer.step()
    if mesh.get_rank() == 0 and step % 10 == 0:
        print(f"step {step}: loss {loss:.6f}")
torch.distributed.destroy_process_group()
