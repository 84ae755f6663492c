import torch
from torch.utils.data import default_collate
from reclip_nb.shapes import ShapesDataset
def open_dataset(name, root=None, split="train", size=None, **kw):
    return ShapesDataset(split=split, **kw)
def step_batches(dataset, batch_size, seed, start_step, steps, workers=0):
    n=len(dataset); per=n//batch_size
    for s in range(start_step, steps):
        ep,k=divmod(s,per)
        p=torch.randperm(n,generator=torch.Generator().manual_seed(seed*1000003+ep))
        idx=p[k*batch_size:(k+1)*batch_size].tolist()
        b=default_collate([dataset[i] for i in idx]); b["index"]=torch.tensor(idx); yield s,b
