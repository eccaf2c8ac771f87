"""Trainings as other people write them, with a fault at a place and kind of one's choice (`at:PLACE`, `raise`, `kill`, `again`)."""

import contextlib
import random
import sys

import numpy
import torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training_harness import STEPS, Case, batch, boom, manager, run

PLACE = next((a[3:] for a in sys.argv[2:] if a.startswith("at:")), None)
AGAIN = "again" in sys.argv[2:]
WHEN = next((int(a[5:]) for a in sys.argv[2:] if a.startswith("when:")), None)
sched = torch.optim.lr_scheduler


class Base(Case):
    place, when = "grad", 9
    def __init__(self):
        self.build(); self.objects = {k: v for k, v in vars(self).items() if hasattr(v, "state_dict")}
    def build(self): self.model = nn.Linear(8, 8); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
    def at(self, place, step, rank, caller):
        if place != (PLACE or self.place): return
        if step == (self.when if WHEN is None else WHEN): boom(caller, rank)
        if AGAIN and step == self.when + 3: boom(caller, rank, who=0, epoch=1)
        if AGAIN and step == self.when + 5: boom(caller, rank, epoch=2)
    def data(self, step, rank): return batch(step, rank)
    def loss(self, x): return self.ddp(x).pow(2).mean()
    def clip(self): pass
    def after(self, step, rank): pass
    def step(self, step, rank, caller):
        self.at("start", step, rank, caller)
        loss = self.loss(self.data(step, rank)); self.at("forward", step, rank, caller)
        self.opt.zero_grad(); loss.backward(); self.clip(); self.at("grad", step, rank, caller)
        self.opt.step(); self.at("updated", step, rank, caller)
        self.after(step, rank); self.at("end", step, rank, caller)
    def result(self):
        own = [t for v in vars(self).values() if isinstance(v, nn.Module) and v is not getattr(self, "ddp", None) for t in [*v.parameters(), *v.buffers()]]
        return [*own, *[torch.tensor(float(g["lr"])) for g in self.opt.param_groups]]


class cnn(Base):  # batch norm, momentum, StepLR
    def build(self):
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True); self.s = sched.StepLR(self.opt, 4, 0.5)
    def data(self, step, rank): return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step * 10 + rank))
    def after(self, step, rank): self.s.step()


class lstm(Base):  # tied embedding and head, LSTM with dropout, autocast, clipping, OneCycleLR
    class Net(nn.Module):
        def __init__(self):
            super().__init__(); self.e = nn.Embedding(16, 8); self.r = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True); self.h = nn.Linear(8, 16); self.h.weight = self.e.weight
        def forward(self, x): return self.h(self.r(self.e(x))[0])
    def build(self):
        self.model = self.Net(); self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2); self.s = sched.OneCycleLR(self.opt, 1e-2, total_steps=STEPS + 1)
    def data(self, step, rank): return (batch(step, rank).abs() * 5).long() % 16
    def loss(self, x):
        with torch.autocast("cpu", torch.bfloat16): return F.cross_entropy(self.ddp(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    def clip(self): nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
    def after(self, step, rank): self.s.step()


class ema(Base):  # an average as an object with state_dict, stepped after the update
    class Ema:
        def __init__(self, model): self.shadow = {k: v.clone() for k, v in model.state_dict().items()}; self.n = 0
        def update(self, model):
            self.n += 1; d = min(0.9, (1 + self.n) / (10 + self.n))
            for k, v in model.state_dict().items(): self.shadow[k].mul_(d).add_(v, alpha=1 - d)
        def state_dict(self): return {"shadow": self.shadow, "n": self.n}
        def load_state_dict(self, s): self.shadow = {k: v.clone() for k, v in s["shadow"].items()}; self.n = s["n"]
    def build(self): super().build(); self.ema = self.Ema(self.model)
    def after(self, step, rank): self.ema.update(self.model)
    def result(self): return [*super().result(), *self.ema.shadow.values(), torch.tensor(self.ema.n)]


class lookahead(Base):  # slow weights in the wrapper's own state, by name
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, base):
            self.base = base; self.count = 0; super().__init__(base.param_groups, {}); self.param_groups = base.param_groups
            self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        def step(self, closure=None):
            self.base.step(); self.count += 1
            if self.count % 4 == 0:
                for s, p in zip(self.slow, (p for g in self.param_groups for p in g["params"])): s.add_(p.data - s, alpha=0.5); p.data.copy_(s)
        def state_dict(self): return {"base": self.base.state_dict(), "slow": self.slow, "count": self.count}
        def load_state_dict(self, s): self.base.load_state_dict(s["base"]); self.slow = [t.clone() for t in s["slow"]]; self.count = s["count"]
    def build(self): self.model = nn.Linear(8, 8); self.opt = self.Lookahead(torch.optim.Adam(self.model.parameters(), lr=1e-2))


class schedule_free(Base):  # Schedule-Free-like: train() and eval() swap the weights; a validation every fifth step
    class SF(torch.optim.Optimizer):
        def __init__(self, p): super().__init__(p, dict(lr=0.05, k=0, mode=True, sum=0.0))
        @torch.no_grad()
        def swap(self, mode):
            for g in self.param_groups:
                if g["mode"] != mode:
                    for p in g["params"]:
                        if "z" in self.state[p]: p.lerp_(self.state[p]["z"], (1 - 1 / 0.9) if not mode else 0.1)
                    g["mode"] = mode
        def train(self): self.swap(True)
        def eval(self): self.swap(False)
        @torch.no_grad()
        def step(self, closure=None):
            for g in self.param_groups:
                g["k"] += 1; c = 1 / g["k"]
                for p in g["params"]:
                    z = self.state[p].setdefault("z", p.clone()); p.lerp_(z, c); p.add_(p.grad, alpha=g["lr"] * (0.9 * (1 - c) - 1)); z.sub_(p.grad, alpha=g["lr"])
    def build(self): self.model = nn.Linear(8, 8); self.opt = self.SF(self.model.parameters())
    def step(self, step, rank, caller):
        self.opt.train(); self.model.train(); super().step(step, rank, caller)
        if step % 5 == 4:
            self.opt.eval(); self.model.eval()
            with torch.no_grad(): v = self.model(batch(99, rank)).pow(2).mean()
            self.at("validation", step, rank, caller); dist.all_reduce(v)


def optimizer(name, **kw):
    def build(self): self.model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)); self.opt = getattr(torch.optim, name)(self.model.parameters(), **kw)
    return build


class fused(Base): build = optimizer("AdamW", lr=torch.tensor(1e-2), fused=True, amsgrad=True)


class sparse_adam(Base):  # an embedding with sparse gradients
    def build(self): self.model = nn.Embedding(16, 8, sparse=True); self.opt = torch.optim.SparseAdam(self.model.parameters(), lr=1e-2)
    def data(self, step, rank): return (batch(step, rank).abs() * 5).long() % 16


class plateau(Base):  # ReduceLROnPlateau on a validation loss every third step
    place, when = "validation", 8
    def build(self): super().build(); self.s = sched.ReduceLROnPlateau(self.opt, factor=0.5, patience=0, threshold=0.5)
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step % 3 == 2:
            self.model.eval()
            with torch.no_grad(): v = self.model(batch(99, rank)).pow(2).mean()
            self.at("validation", step, rank, caller); dist.all_reduce(v); self.s.step(v.item()); self.at("scheduled", step, rank, caller); self.model.train()


class epochs_a(Base):  # a shuffling loader without a generator, skipping from epoch 0, dropout and augmentation
    workers = {}
    when = 8  # 9, the last batch of an epoch, ends with other numbers
    def build(self): self.model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)); self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
    def dataset(self): return TensorDataset(torch.arange(320.).view(40, 8) / 320)
    def loader(self): return DataLoader(self.dataset(), batch_size=8, shuffle=True, **self.workers)
    def enter(self, caller, rank):
        super().enter(caller, rank); data = self.loader(); first = manager.restore()
        self.it = (x for epoch in range(9) for i, (x,) in enumerate(data) if epoch * len(data) + i >= first)
    def data(self, step, rank): return next(self.it)


class epochs_b(epochs_a):  # from the current epoch
    def enter(self, caller, rank):
        Case.enter(self, caller, rank); data = self.loader(); first = manager.restore(); n = len(data)
        self.it = (x for epoch in range(first // n, 9) for i, (x,) in enumerate(data) if epoch * n + i >= first)


class workers_a(epochs_a): workers = dict(num_workers=2, persistent_workers=True)  # persistent workers
class workers_b(epochs_b): workers = dict(num_workers=2)  # workers of an epoch


class distributed(epochs_b):  # DistributedSampler with set_epoch, from the current epoch; random augmentation before the forward
    def enter(self, caller, rank):
        Case.enter(self, caller, rank); random.seed(rank); numpy.random.seed(rank)
        from torch.utils.data.distributed import DistributedSampler
        sampler = DistributedSampler(self.dataset()); data = DataLoader(self.dataset(), batch_size=4, sampler=sampler); first = manager.restore(); n = len(data)
        def batches():
            for epoch in range(first // n, 9):
                sampler.set_epoch(epoch)
                for i, (x,) in enumerate(data):
                    if epoch * n + i >= first: yield x
        self.it = batches()
    def data(self, step, rank):
        x = next(self.it)
        if random.random() < 0.5: x = x.flip(1)
        return x + float(numpy.random.normal()) + torch.rand(())


class stateful(Base):  # StatefulDataLoader, shuffle, workers, several epochs, registered
    workers = dict(num_workers=2)
    def build(self):
        super().build()
        from torchdata.stateful_dataloader import StatefulDataLoader
        self.loader = StatefulDataLoader(torch.arange(320.).view(40, 8) / 320, batch_size=8, shuffle=True, **self.workers)
    def enter(self, caller, rank):
        super().enter(caller, rank)
        def batches():
            while True: yield from self.loader
        self.it = batches()
    def data(self, step, rank): return next(self.it)


class stateful_main(stateful): workers = {}  # without workers


class gan11(Base):  # one to one, noise drawn between
    def build(self):
        self.d, self.g = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 1)), nn.Linear(4, 8)
        self.od, self.opt = torch.optim.Adam(self.d.parameters(), betas=(0.5, 0.9)), torch.optim.Adam(self.g.parameters(), lr=1e-2)
    def enter(self, caller, rank): self.ddp, self.dg = manager.data_parallel(self.d), manager.data_parallel(self.g)
    def step(self, step, rank, caller):
        self.at("start", step, rank, caller); x = batch(step, rank); fake = self.dg(torch.randn(4, 4))
        loss = F.softplus(-self.ddp(torch.cat([x, fake.detach()]))).mean(); self.od.zero_grad(); loss.backward(); self.at("d_grad", step, rank, caller); self.od.step()
        self.at("grad", step, rank, caller)
        loss = F.softplus(-self.ddp(self.dg(torch.randn(4, 4)))).mean(); self.opt.zero_grad(); loss.backward(); self.at("g_grad", step, rank, caller); self.opt.step(); self.at("updated", step, rank, caller)


class wgan(gan11):  # n_critic of three with clipping
    def step(self, step, rank, caller):
        x = batch(step, rank)
        for k in range(3):
            fake = self.dg(torch.randn(4, 4)).detach(); loss = self.ddp(fake).mean() - self.ddp(x).mean(); self.od.zero_grad(); loss.backward(); self.od.step()
            if k == 1: self.at("grad", step, rank, caller)
            for p in self.d.parameters(): p.data.clamp_(-0.1, 0.1)
        self.at("between", step, rank, caller)
        loss = -self.d(self.dg(torch.randn(4, 4))).mean(); self.opt.zero_grad(); loss.backward(); self.opt.step(); self.at("updated", step, rank, caller)


class actor_critic(Base):  # two optimizers, target network, a replay buffer of the script's own
    def build(self):
        self.a, self.c, self.t = nn.Linear(8, 2), nn.Linear(10, 1), nn.Linear(10, 1).requires_grad_(False); self.t.load_state_dict(self.c.state_dict())
        self.oc, self.opt = torch.optim.Adam(self.c.parameters(), lr=1e-2), torch.optim.Adam(self.a.parameters(), lr=1e-2)
    def enter(self, caller, rank): self.ddp, self.da = nn.parallel.DistributedDataParallel(self.c), nn.parallel.DistributedDataParallel(self.a)
    def step(self, step, rank, caller):
        x = batch(step, rank)
        with torch.no_grad(): act = self.a(x) + torch.randn(4, 2) * 0.1; y = x.sum(1, keepdim=True) + 0.9 * self.t(torch.cat([x, act], 1))
        loss = F.mse_loss(self.ddp(torch.cat([x, act], 1)), y); self.oc.zero_grad(); loss.backward(); self.oc.step(); self.at("between", step, rank, caller)
        loss = -self.c(torch.cat([x, self.da(x)], 1)).mean(); self.opt.zero_grad(); loss.backward(); self.at("grad", step, rank, caller); self.opt.step(); self.at("updated", step, rank, caller)
        with torch.no_grad():
            for t, p in zip(self.t.parameters(), self.c.parameters()): t.mul_(0.95).add_(p, alpha=0.05)
        self.at("end", step, rank, caller)


class ppo(Base):  # one collection, then three epochs of two updates each
    def build(self): self.model = nn.Linear(8, 2); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
    def step(self, step, rank, caller):
        x = torch.randn(8, 8)
        with torch.no_grad(): old = self.model(x).log_softmax(1); act = torch.multinomial(old.exp(), 1)
        adv = x.sum(1, keepdim=True)
        for k in range(3):
            for j in torch.randperm(8).split(4):
                ratio = (self.ddp(x[j]).log_softmax(1).gather(1, act[j]) - old[j].gather(1, act[j])).exp(); loss = -torch.min(ratio * adv[j], ratio.clamp(0.8, 1.2) * adv[j]).mean()
                self.opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                if k == 1: self.at("grad", step, rank, caller)
                self.opt.step()
            if k == 1: self.at("between", step, rank, caller)


class maml(Base):  # inner steps on a copy by functional_call, gradients through them
    def step(self, step, rank, caller):
        loss = 0
        for task in range(2):
            w = dict(self.model.named_parameters()); x = batch(2 * step + task, rank)
            for k in range(2):
                g = torch.autograd.grad(torch.func.functional_call(self.model, w, x).pow(2).mean(), list(w.values()), create_graph=True); w = {n: p - 0.1 * d for (n, p), d in zip(w.items(), g)}
            loss = loss + torch.func.functional_call(self.model, w, x + torch.randn(4, 8)).pow(2).mean(); self.at("forward", step, rank, caller)
        self.opt.zero_grad(); loss.backward(); self.at("grad", step, rank, caller)
        for p in self.model.parameters(): dist.all_reduce(p.grad); p.grad /= dist.get_world_size()
        self.opt.step(); self.at("updated", step, rank, caller)


class reptile(Base):  # Reptile: inner SGD on the model itself, then weights are set back half way, by assignment to .data
    def step(self, step, rank, caller):
        old = [p.detach().clone() for p in self.model.parameters()]; inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for k in range(3):
            inner.zero_grad(); self.loss(batch(3 * step + k, rank)).backward(); inner.step()
            if k == 1: self.at("grad", step, rank, caller)
        self.at("between", step, rank, caller)
        for p, o in zip(self.model.parameters(), old): p.data = o + 0.5 * (p.data - o)
        self.at("updated", step, rank, caller)


class no_sync(Base):  # accumulation within one step with no_sync, several passes in a step
    def build(self): self.model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
    def step(self, step, rank, caller):
        for k in range(3):
            with self.ddp.no_sync() if k < 2 else contextlib.nullcontext(): (self.loss(batch(3 * step + k, rank)) / 3).backward()
            if k == 1: self.at("between", step, rank, caller)
        self.at("grad", step, rank, caller); self.opt.step(); self.opt.zero_grad(); self.at("updated", step, rank, caller)


class hand_scaled(Base):  # loss scaling by hand, the scale a Python number of the script's, in an object with state_dict
    class Scale:
        value = 8.0; good = 0
        def state_dict(self): return dict(value=self.value, good=self.good)
        def load_state_dict(self, s): self.value, self.good = s["value"], s["good"]
    def build(self): super().build(); self.scale = self.Scale()
    def step(self, step, rank, caller):
        self.opt.zero_grad(); (self.loss(batch(step, rank)) * self.scale.value * (float("inf") if step in (3, 8) else 1)).backward()
        for p in self.model.parameters(): p.grad /= self.scale.value
        ok = all(p.grad.isfinite().all() for p in self.model.parameters()); self.at("grad", step, rank, caller)
        if ok: self.opt.step(); self.scale.good += 1; self.scale.value *= 2 if self.scale.good % 4 == 0 else 1
        else: self.scale.value /= 2
        self.at("updated", step, rank, caller)


class unfreeze(Base):  # first layer joins at step 6: requires_grad and DDP anew, the same optimizer
    def build(self):
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)); self.model[0].requires_grad_(False); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
    def enter(self, caller, rank):
        self.melted = manager.restore() > 6; self.model[0].requires_grad_(self.melted); super().enter(caller, rank)
    def step(self, step, rank, caller):
        if step >= 6 and not self.melted: self.melted = True; self.model[0].requires_grad_(True); self.ddp = manager.data_parallel(self.model)
        super().step(step, rank, caller)


class group(Base):  # a group is added at step 6 and nothing said of it
    def build(self): self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)); self.opt = torch.optim.Adam(self.model[1].parameters(), lr=1e-2)
    def step(self, step, rank, caller):
        if step >= 6 and len(self.opt.param_groups) == 1: self.opt.add_param_group(dict(params=list(self.model[0].parameters()), lr=1e-3))
        super().step(step, rank, caller)


class compiled_model(Base):  # torch.compile around the model, registered compiled
    def build(self): self.model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)), backend="eager"); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)


class begin_end(epochs_b):  # real nested loops with begin_step and end_step
    def enter(self, caller, rank):
        Case.enter(self, caller, rank); data = self.loader(); step = manager.restore(); n = len(data)
        for epoch in range(step // n, STEPS // n):
            for i, (x,) in enumerate(data):
                if epoch * n + i < step: continue
                manager.begin_step(); self.x = x; Base.step(self, step, rank, caller); manager.end_step(); step += 1
            self.at("validation", step - 1, rank, caller)
    def data(self, step, rank): return self.x


class quiet(Base):  # before another one, in one job
    def at(self, *_): pass


if __name__ == "__main__":
    run(globals())
