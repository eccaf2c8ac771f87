"""More members of the kinds in `trainings.py`."""

import random
import numpy
import torch, torch.distributed as dist
from torch import nn
from training_harness import STEPS, Case, batch, boom, manager, run


class container(Case):  # optimizers in a container whose own state is empty, as torchtitan's is
    class Container(torch.optim.Optimizer):
        def __init__(self, optimizers):
            self.optimizers = optimizers
            super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {"lr": 1.0})
        def step(self, closure=None):
            for o in self.optimizers: o.step()
        def zero_grad(self, set_to_none=True):
            for o in self.optimizers: o.zero_grad()
        def state_dict(self):
            return {f"{i}.{n}.{k}": v for i, o in enumerate(self.optimizers) for n, s in o.state_dict()["state"].items() for k, v in s.items()}
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.opt = self.Container([torch.optim.Adam(m.parameters(), lr=1e-2) for m in self.model])
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)


class odd_state(Case):  # optimizer state under a name, nested, in lists and in Python numbers
    class Odd(torch.optim.Optimizer):
        def __init__(self, params): super().__init__(params, {"lr": 0.1})
        @torch.no_grad()
        def step(self):
            common = self.state["common"]
            common["count"] = common.get("count", 0) + 1
            for p in self.param_groups[0]["params"]:
                s = self.state[p]
                s.setdefault("history", []).insert(0, p.grad.clone())
                del s["history"][3:]
                s["factors"] = {"mean": sum(s["history"]) / len(s["history"]), 7: torch.tensor(float(len(s["history"])))}
                common["norm"] = common.get("norm", torch.zeros(())) + p.grad.norm()
                p.sub_(s["factors"]["mean"] * 0.1 / (1 + common["norm"]) * common["count"] / s["factors"][7])
    def __init__(self):
        self.model = nn.Linear(8, 8); self.opt = self.Odd(self.model.parameters())
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)


class extra_keys(Case):  # an optimizer with more in its state_dict than torch's two entries
    class Mine(torch.optim.SGD):
        boost = 1.0
        def step(self, closure=None):
            self.boost *= 0.95
            for g in self.param_groups: g["lr"] = 0.1 * self.boost
            return super().step(closure)
        def state_dict(self): return {**super().state_dict(), "boost": self.boost}
        def load_state_dict(self, s): s = dict(s); self.boost = s.pop("boost"); super().load_state_dict(s)
    def __init__(self):
        self.model = nn.Linear(8, 8); self.opt = self.Mine(self.model.parameters(), lr=0.1, momentum=0.9)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)


class wrapped(Case):  # a wrapper like accelerate's: an Optimizer without torch's constructor, whose state is another's
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner): self.optimizer = inner
        @property
        def state(self): return self.optimizer.state
        @state.setter
        def state(self, s): self.optimizer.state = s
        @property
        def param_groups(self): return self.optimizer.param_groups
        @param_groups.setter
        def param_groups(self, g): self.optimizer.param_groups = g
        @property
        def defaults(self): return self.optimizer.defaults
        def state_dict(self): return self.optimizer.state_dict()
        def load_state_dict(self, s): self.optimizer.load_state_dict(s)
        def zero_grad(self, set_to_none=None): self.optimizer.zero_grad()
        def step(self, closure=None): self.optimizer.step()
    def __init__(self):
        self.model = nn.Linear(8, 8); self.opt = self.Wrapper(torch.optim.Adam(self.model.parameters(), lr=1e-2))
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)


class sam(Case):  # two passes, the weights moved in between (SAM), by methods that are not `step`
    class SAM(torch.optim.Optimizer):
        def __init__(self, params, base, **kw):
            super().__init__(params, dict(rho=0.05, **kw))
            self.base_optimizer = base(self.param_groups, **kw)
            self.param_groups = self.base_optimizer.param_groups
        @torch.no_grad()
        def first_step(self):
            for p in self.param_groups[0]["params"]:
                self.state[p]["old"] = p.data.clone(); p.add_(p.grad, alpha=0.05)
        @torch.no_grad()
        def second_step(self):
            for p in self.param_groups[0]["params"]: p.data = self.state[p]["old"]
            self.base_optimizer.step()
        def step(self, closure=None): raise NotImplementedError
    def __init__(self):
        self.model = nn.Linear(8, 8); self.opt = self.SAM(self.model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        self.opt.zero_grad(); self.ddp(batch(step, rank)).pow(2).mean().backward(); self.opt.first_step()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); self.ddp(batch(step, rank)).pow(2).mean().backward(); self.opt.second_step()


class slices(Case):  # parameters that are slices of larger tensors, by rows and by columns
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            big = torch.randn(8, 24) * 0.3
            self.a, self.b = nn.Parameter(big[:, :8]), nn.Parameter(big[:, 8:16])
            rows = torch.randn(16, 8); self.c = nn.Parameter(rows[4:12]); self.n = nn.Parameter(torch.tensor(1.0).expand(1))
        def forward(self, x): return (x @ self.a.t() @ self.b @ self.c) * self.n
    def __init__(self):
        self.model = self.Net(); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)


class channels_last(Case):  # weights and their optimizer state in another order of memory, batch norm beside them
    def __init__(self):
        self.model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
        self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(100 * step + rank)).contiguous(memory_format=torch.channels_last)
        self.opt.zero_grad(); (self.ddp(x) - 0.3).pow(2).mean().backward()
        if step == 9: boom(caller, rank, "kill")
        self.opt.step()
    def result(self): return [*super().result(), *[v for s in self.opt.state.values() for v in s.values()]]


class converted(Case):  # `.to()` after register: parameters and buffers in other tensors than those that were there
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
        manager.register(**self.objects)
        self.model.double()
    def step(self, step, rank, caller):
        self.opt.zero_grad(); self.ddp(batch(step, rank).double()).pow(2).mean().backward()
        if step == 9: boom(caller, rank, "kill")
        self.opt.step()


class silent_buffer(Case):  # a buffer of 1 MB, written through .data in forward
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(8, 8); self.register_buffer("bank", torch.zeros(8, 32768))
        def forward(self, x):
            self.bank.data.mul_(0.9); self.bank.data[:, :8].add_(x.detach().mean(0), alpha=0.1); return super().forward(x - self.bank[0, :8])
    own = False
    def __init__(self):
        self.model = self.Net(); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def enter(self, caller, rank): self.ddp = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class silent_decay(Case):  # weights decay before the forward pass, through .data
    def step(self, step, rank, caller):
        for p in self.model.parameters(): p.data.mul_(0.9)
        if step == 9: boom(caller, rank)
        super().step(step, rank, caller)


class rare_average(Case):  # an average of the weights every fifth step, without manager.update()
    def __init__(self):
        super().__init__()
        from torch.optim.swa_utils import AveragedModel
        self.swa = AveragedModel(self.model); self.objects["swa"] = self.swa
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step % 5 == 4:
            if step == 4: boom(caller, rank)
            dist.all_reduce(torch.zeros(1)); self.swa.update_parameters(self.model)
    def result(self): return [*super().result(), *self.swa.parameters(), *self.swa.buffers()]


class validated(Case):  # a scheduler that moves after a validation, once in five steps
    def __init__(self):
        super().__init__(); self.s = torch.optim.lr_scheduler.StepLR(self.opt, 1, 0.5); self.objects["s"] = self.s
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step % 5 == 4:
            if step == 9: boom(caller, rank)
            dist.all_reduce(torch.zeros(1)); self.s.step()


class logged(Case):  # a fault in logging after the update, every rank waits there
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step == 9: boom(caller, rank)
        dist.all_reduce(torch.zeros(1))


class several_updates(Case):  # two updates by one optimizer in a step
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step == 9: boom(caller, rank)
        super().step(100 + step, rank, caller)


class own_noise(Case):  # noise after backward from generators that differ by rank, the same for all by a broadcast
    own_seeds = 1
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward()
        for p in self.model.parameters():
            noise = torch.randn(p.shape); dist.broadcast(noise, 0); p.grad.add_(noise, alpha=0.1)
        if step == 9: boom(caller, rank, "kill")
        self.opt.step()


class other_generators(Case):  # numpy's and Python's, before forward and after the update
    def enter(self, caller, rank): super().enter(caller, rank); random.seed(rank); numpy.random.seed(rank)
    def step(self, step, rank, caller):
        x = batch(step, rank) * random.random() + float(numpy.random.rand())
        loss = self.ddp(x).pow(2).mean(); self.opt.zero_grad(); loss.backward(); self.opt.step()
        if step == 9: boom(caller, rank, "kill")
        random.random()


class prologue(Case):  # an order drawn before the loop, and a shuffling loader's iterator made there
    def enter(self, caller, rank):
        super().enter(caller, rank)
        from torch.utils.data import DataLoader
        from itertools import islice
        self.order = torch.randperm(STEPS)
        first = manager.restore() if not manager._ready else manager._tracker.point
        self.it = islice(iter(DataLoader(torch.arange(160.).view(20, 8) / 160, batch_size=1, shuffle=True)), first, None)
    def step(self, step, rank, caller):
        x = next(self.it) + batch(int(self.order[step]), rank)
        loss = self.ddp(x).pow(2).mean()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class shuffled(Case):  # an iterator over a shuffling DataLoader, made in the resumed step: 20 batches an epoch
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)); self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.objects = dict(model=self.model, opt=self.opt)
    def enter(self, caller, rank):
        super().enter(caller, rank)
        from torch.utils.data import DataLoader
        data = DataLoader(torch.arange(640.).view(80, 8) / 640, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
        first = manager.restore()
        self.data = (x for epoch in range(9) for i, x in enumerate(data) if epoch * len(data) + i >= first)
    def step(self, step, rank, caller):
        loss = self.ddp(next(self.data)).pow(2).mean()
        if step == 13: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class prefetched(Case):  # a batch of a registered loader is fetched before the loop, and carried in a variable
    def __init__(self):
        super().__init__()
        from torchdata.stateful_dataloader import StatefulDataLoader
        self.loader = StatefulDataLoader(torch.arange(400.).view(-1, 1), batch_size=2); self.objects["loader"] = self.loader
    def enter(self, caller, rank): super().enter(caller, rank); self.it = iter(self.loader); self.x = next(self.it)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank)
        x, self.x = self.x, next(self.it)
        loss = (self.ddp(batch(step, rank)) * x[0]).pow(2).mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class ahead(Case):  # the loader moves after the update: the next batch is fetched at the end of a step
    def __init__(self):
        super().__init__()
        from torchdata.stateful_dataloader import StatefulDataLoader
        self.loader = StatefulDataLoader(torch.arange(400.).view(-1, 1), batch_size=2, num_workers=2); self.objects["loader"] = self.loader
    def enter(self, caller, rank): super().enter(caller, rank); self.it = iter(self.loader)
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        if step == 9: boom(caller, rank)
        with torch.no_grad(): self.seen = next(self.it).sum()
        with torch.no_grad(): self.model.bias.add_(self.seen, alpha=1e-4)


class caught(Case):  # an optimizer's step that raises and is caught
    def step(self, step, rank, caller):
        if step == 5:
            def bad(): raise ValueError("no loss")
            try: self.opt.step(bad)
            except ValueError: pass
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class meter(Case):  # a registered meter of this rank's own, changed after the update
    class Meter:
        total = 0.0
        def state_dict(self): return {"total": self.total}
        def load_state_dict(self, s): self.total = s["total"]
    def __init__(self):
        super().__init__(); self.meter = self.Meter(); self.objects["meter"] = self.meter
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step == 9: boom(caller, rank)
        self.meter.total += float(batch(step, rank).sum())
    def result(self): return [*super().result(), torch.tensor(self.meter.total)]


class bank(Case):  # an object of this rank's own that is the same on all until the faulted step fills it, and chooses what is learned
    class Bank:
        def __init__(self): self.losses = torch.zeros(8)
        def state_dict(self): return {"losses": self.losses.clone()}
        def load_state_dict(self, s): self.losses = s["losses"].clone()
    def __init__(self):
        super().__init__(); self.bank = self.Bank(); self.objects["bank"] = self.bank
    def step(self, step, rank, caller):
        rows = batch(step, rank); weights = 1 + self.bank.losses[:4]
        loss = (self.ddp(rows).pow(2).mean(1) * weights).mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        if step == 9: boom(caller, rank, "kill", who=0)
        if step >= 9: self.bank.losses[:4] = rows.mean(1)
    def result(self): return [*super().result(), self.bank.losses]


class unfrozen(Case):  # a parameter group more in the faulted step, which goes back to where there was one less
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.opt = torch.optim.Adam(self.model[1].parameters(), lr=1e-2)
        self.counted = bank.Bank()
        self.objects = dict(model=self.model, opt=self.opt, counted=self.counted)
    def step(self, step, rank, caller):
        if step == 9 and len(self.opt.param_groups) == 1: self.opt.add_param_group({"params": self.model[0].parameters(), "lr": 1e-3})
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward()
        if step == 9: boom(caller, rank, "raise")
        self.opt.step()
        self.counted.losses += rank + 1


class over(Case):  # a fault when the last step is complete: what follows the loop draws as it would have
    def __init__(self):
        super().__init__(); self.drop = nn.Dropout(0.5)
    def step(self, step, rank, caller):
        loss = self.drop(self.ddp(batch(step, rank))).pow(2).mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()
    def result(self):
        boom(self.caller, dist.get_rank(), "raise")
        dist.barrier()
        return [*super().result(), torch.rand(4)]
    def enter(self, caller, rank):
        super().enter(caller, rank); self.caller = caller


class scaled(Case):  # GradScaler with an overflow, and a fault in unscale's step, killed
    def __init__(self):
        super().__init__(); self.scaler = torch.amp.GradScaler("cpu", growth_interval=3); self.objects["scaler"] = self.scaler
    def step(self, step, rank, caller):
        self.opt.zero_grad(); loss = self.ddp(batch(step, rank)).pow(2).mean()
        if step in (4, 8): loss = loss * float("inf")
        self.scaler.scale(loss).backward(); self.scaler.unscale_(self.opt)
        if step == 9: boom(caller, rank, "kill")
        self.scaler.step(self.opt); self.scaler.update()


class accumulated(Case):  # windows of three passes, clipped, with a scheduler
    def __init__(self):
        super().__init__(); self.s = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 20); self.objects["s"] = self.s
    def step(self, step, rank, caller):
        (self.ddp(batch(step, rank)).pow(2).mean() / 3).backward()
        if step == 10: boom(caller, rank, "kill")
        if step % 3 == 2: nn.utils.clip_grad_norm_(self.model.parameters(), 1.0); self.opt.step(); self.s.step(); self.opt.zero_grad()


class frozen(Case):  # a part without gradients, and a whole module without (a teacher)
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)); self.teacher = nn.Linear(8, 8).requires_grad_(False)
        self.opt = torch.optim.AdamW(self.model[1].parameters(), lr=1e-2); self.objects = dict(model=self.model, opt=self.opt, teacher=self.teacher)
    def step(self, step, rank, caller):
        x = batch(step, rank); loss = (self.ddp(x) - self.teacher(x)).pow(2).mean(); self.opt.zero_grad(); loss.backward()
        if step == 9: boom(caller, rank, "kill")
        self.opt.step()
    def result(self): return [*super().result(), *self.teacher.parameters()]


class momentum_encoder(Case):  # a second model follows the first after each update (MoCo, DINO, BYOL)
    def __init__(self):
        super().__init__(); self.slow = nn.Linear(8, 8).requires_grad_(False); self.objects["slow"] = self.slow
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step == 9: boom(caller, rank)
        with torch.no_grad():
            for s, p in zip(self.slow.parameters(), self.model.parameters()): s.mul_(0.9).add_(p, alpha=0.1)
    def result(self): return [*super().result(), *self.slow.parameters()]


class spectral(Case):  # buffers that a parametrization changes in forward
    def __init__(self):
        self.model = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        if step == 9: boom(caller, rank, "kill")
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class assigned(Case):  # load_state_dict(assign=True) after register puts other parameters in their places
    def __init__(self):
        super().__init__(); manager.register(**self.objects)
        self.model.load_state_dict({k: v.clone() for k, v in self.model.state_dict().items()}, assign=True)
        self.opt.param_groups[0]["params"] = list(self.model.parameters())
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)


if __name__ == "__main__":
    run(globals())
