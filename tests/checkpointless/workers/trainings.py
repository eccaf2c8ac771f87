"""Small trainings of other people's kinds, each with one way to lose its numbers in a fault."""

import os
import torch, torch.distributed as dist
from torch import nn
from training_harness import Case, batch, boom, manager, run


class gan(Case):  # the generator every third pass
    def __init__(self):
        self.d, self.g = nn.Linear(8, 8), nn.Linear(8, 8)
        self.od, self.og = torch.optim.Adam(self.d.parameters()), torch.optim.Adam(self.g.parameters(), lr=1e-2)
        self.objects = dict(d=self.d, g=self.g, od=self.od, og=self.og)
    def enter(self, caller, rank):
        self.dd, self.dg = nn.parallel.DistributedDataParallel(self.d), nn.parallel.DistributedDataParallel(self.g)
    def step(self, step, rank, caller):
        x = batch(step, rank)
        loss = self.dd(x).pow(2).mean(); self.od.zero_grad(); loss.backward(); self.od.step()
        if step % 3 == 0:
            if step == 9: boom(caller, rank)
            loss = self.dg(x).pow(2).mean(); self.og.zero_grad(); loss.backward(); self.og.step()
    def result(self): return [*self.d.parameters(), *self.g.parameters()]


class clamp(Case):  # weights are clipped through .data after the update (WGAN's idiom); the loss drives them to the limit
    def step(self, step, rank, caller):
        loss = -self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        if step == 9: boom(caller, rank)
        for p in self.model.parameters(): p.data.clamp_(-0.2, 0.2)


class noise(Case):  # gradient noise, drawn after backward, the same on every rank
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward()
        for p in self.model.parameters(): p.grad.add_(torch.randn(p.shape), alpha=0.1)
        if step == 9: boom(caller, rank, "kill")
        self.opt.step()


class unregistered(Case):  # the optimizer was forgotten
    def __init__(self):
        super().__init__(); del self.objects["opt"]
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank)
        super().step(step, rank, caller)


class prepass(Case):  # weights decay before the forward pass
    def step(self, step, rank, caller):
        with torch.no_grad():
            for p in self.model.parameters(): p.mul_(0.9)
        if step == 9: boom(caller, rank)
        super().step(step, rank, caller)


class QR(torch.optim.Optimizer):
    def __init__(self, params): super().__init__(params, {})
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is None or p.dim() < 2: continue
            s = self.state[p]
            if "q" not in s: s["q"] = torch.linalg.qr(p.grad)[0]
            s["q"] = torch.linalg.qr(s["q"] + p.grad)[0]
            p.sub_(s["q"] @ p.grad, alpha=0.1)


class qr(Case):  # optimizer state in column-major order
    def __init__(self):
        self.model = nn.Linear(8, 8); self.opt = QR(self.model.parameters())
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)
    def result(self): return [*self.model.parameters(), self.opt.state[self.model.weight]["q"]]


class extra(Case):  # module state behind get_extra_state
    class Net(nn.Linear):
        count = 0
        def get_extra_state(self): return {"count": self.count}
        def set_extra_state(self, s): self.count = s["count"]
        def forward(self, x):
            self.count += 1; return super().forward(x) * (1 + 0.01 * self.count)
    def __init__(self):
        self.model = self.Net(8, 8); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class mp(Case):  # ranks with parts of one model: same names and shapes, other weights
    def __init__(self):
        torch.manual_seed(int(os.environ["RANK"])); super().__init__()
    def enter(self, caller, rank): pass
    def step(self, step, rank, caller):
        x = batch(step, 0); loss = self.model(x).pow(2).mean()
        if step == 9: boom(caller, rank, "kill")
        dist.all_reduce(loss.detach()); self.opt.zero_grad(); loss.backward(); self.opt.step()


class fsdp1(Case):
    def __init__(self): self.objects = {}
    def enter(self, caller, rank):
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.ddp = FSDP(self.model, device_id=torch.device("cpu"))
        self.opt = torch.optim.Adam(self.ddp.parameters(), lr=1e-2)
        manager.register(model=self.ddp, opt=self.opt); manager.restore()
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)
    def result(self): return [p.detach() for p in self.ddp.parameters()]


class sched(Case):  # a scheduler with an attribute that cannot be carried
    def __init__(self):
        super().__init__()
        class Mine(torch.optim.lr_scheduler.LRScheduler):
            def __init__(self, o): self.fn = lambda e: 0.9**e; super().__init__(o)
            def get_lr(self): return [1e-2 * self.fn(self.last_epoch)]
        self.s = Mine(self.opt); self.objects["sched"] = self.s
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller); self.s.step()


class groups(Case):  # a group is added at step 5, and everything registered again
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(8, 8); self.extra = nn.Parameter(torch.zeros(8))
        def forward(self, x): return super().forward(x) + self.extra
    def __init__(self):
        self.model = self.Net()
        self.opt = torch.optim.Adam([self.model.weight, self.model.bias], lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        if step >= 5 and len(self.opt.param_groups) == 1:
            self.opt.add_param_group(dict(params=[self.model.extra])); manager.register(**self.objects)
        if step == 9: boom(caller, rank, "kill")
        super().step(step, rank, caller)
    def result(self): return [*self.model.parameters(), *[v for s in self.opt.state.values() for v in s.values()]]


class loader(Case):
    def __init__(self):
        super().__init__()
        from torchdata.stateful_dataloader import StatefulDataLoader
        self.loader = StatefulDataLoader(torch.arange(400.).view(-1, 1), batch_size=2, num_workers=0)
        self.objects["loader"] = self.loader
        self.seen = []
    def enter(self, caller, rank): super().enter(caller, rank); self.it = iter(self.loader)
    def step(self, step, rank, caller):
        x = next(self.it)
        if step == 9: boom(caller, rank, epoch=0)
        if step == 14: boom(caller, rank, epoch=1)
        loss = (self.ddp(batch(step, rank)) * x[0]).pow(2).mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        if rank == 0: print("consumed", step, x.flatten().tolist(), flush=True)


class static(Case):  # with three ranks: static_graph
    kw = dict(static_graph=True)
    def __init__(self):
        self.model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
        self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def enter(self, caller, rank): self.ddp = manager.data_parallel(self.model, bucket_cap_mb=0.001, **self.kw)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank)
        super().step(step, rank, caller)


class plain(static): kw = {}


class compiled(Case):  # the optimizer's step compiled
    def __init__(self):
        super().__init__()
        self.fast = torch.compile(lambda: self.opt.step(), backend="eager")
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward()
        if step == 9: boom(caller, rank)
        self.fast()
        if rank == 0 and step in (2, 8): print("point", step, manager._tracker.point, flush=True)


class rebind(Case):  # a buffer bound to a new tensor in every forward pass
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(8, 8); self.register_buffer("mean", torch.zeros(8))
        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0); return super().forward(x - self.mean)
    def __init__(self):
        self.model = self.Net(); self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)
    def enter(self, caller, rank): self.ddp = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class lbfgs(Case):  # a fault in a closure that LBFGS.step calls
    def __init__(self):
        self.model = nn.Linear(8, 8); self.opt = torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=3)
        self.objects = dict(model=self.model, opt=self.opt)
    def step(self, step, rank, caller):
        calls = [0]
        def closure():
            calls[0] += 1
            if step == 9 and calls[0] == 2: boom(caller, rank)
            self.opt.zero_grad(); loss = self.ddp(batch(step, rank)).pow(2).mean(); loss.backward()
            loss = loss.detach().clone(); dist.all_reduce(loss); return loss
        self.opt.step(closure)


class average(Case):  # torch's AveragedModel, registered, updated inside manager.update() as the docs show
    def __init__(self):
        super().__init__()
        from torch.optim.swa_utils import AveragedModel
        self.swa = AveragedModel(self.model); self.objects["swa"] = self.swa
    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad(); loss.backward()
        if step == 9: boom(caller, rank)
        with manager.update(): self.opt.step(); self.swa.update_parameters(self.model)
    def result(self): return [*super().result(), *self.swa.parameters(), *self.swa.buffers()]


class scaler(Case):  # unscale_, clip, fault: the registered GradScaler's stage is not in its state_dict
    def __init__(self):
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu"); self.objects["scaler"] = self.scaler
    def step(self, step, rank, caller):
        self.opt.zero_grad(); self.scaler.scale(self.ddp(batch(step, rank)).pow(2).mean()).backward()
        self.scaler.unscale_(self.opt); nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if step == 9: boom(caller, rank, who=rank)  # on every rank
        self.scaler.step(self.opt); self.scaler.update()


class lazy_loader(Case):  # the iterator of a DataLoader is made in the resumed step: it draws from torch's generator
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)); self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.objects = dict(model=self.model, opt=self.opt)
    def enter(self, caller, rank):
        super().enter(caller, rank)
        from torch.utils.data import DataLoader
        data = DataLoader(torch.arange(640.).view(80, 8) / 640, batch_size=4)
        first = manager.restore()
        self.data = (x for epoch in range(9) for i, x in enumerate(data) if epoch * len(data) + i >= first)
    def step(self, step, rank, caller):
        loss = self.ddp(next(self.data)).pow(2).mean()
        if step == 9: boom(caller, rank)
        self.opt.zero_grad(); loss.backward(); self.opt.step()


class own_checkpoint(Case):  # the script loads a checkpoint of its own after restore()
    path = "/tmp/own-checkpoint-%s.pt" % os.environ.get("TORCHELASTIC_RUN_ID", "x")
    def enter(self, caller, rank):
        if os.path.exists(self.path): self.model.load_state_dict(torch.load(self.path))
        super().enter(caller, rank)
    def step(self, step, rank, caller):
        if step == 9: boom(caller, rank)
        super().step(step, rank, caller)
        if step == 3 and rank == 0: torch.save(self.model.state_dict(), self.path)


class after_update(Case):  # registered, changed after the update: on a rank that was cut off there it is never changed
    class Meter:
        n = 0
        def state_dict(self): return {"n": self.n}
        def load_state_dict(self, s): self.n = s["n"]
    def __init__(self):
        super().__init__(); self.meter = self.Meter(); self.objects["meter"] = self.meter
    def step(self, step, rank, caller):
        super().step(step, rank, caller)
        if step == 9: boom(caller, rank)
        dist.all_reduce(torch.zeros(1))  # logging
        self.meter.n += 1
    def result(self): return [*super().result(), torch.tensor(self.meter.n)]


if __name__ == "__main__":
    run(globals())
