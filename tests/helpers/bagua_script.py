"""A script for Bagua, as its getting-started page builds one, but for the CPU and for digits that need no download.

The test puts `lightning_accel.` before `bagua` in the imports, and changes nothing else.
"""

import bagua.torch_api as bagua
import torch
from bagua.torch_api.algorithms import gradient_allreduce
from sklearn.datasets import load_digits
from torch import nn

bagua.init_process_group()
torch.manual_seed(bagua.get_rank())  # what the ranks start from must not matter

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
train_dataset = torch.utils.data.TensorDataset(images[:1500], labels[:1500])
test_dataset = torch.utils.data.TensorDataset(images[1500:], labels[1500:])

train_sampler = torch.utils.data.distributed.DistributedSampler(
    train_dataset, num_replicas=bagua.get_world_size(), rank=bagua.get_rank()
)
train_loader = torch.utils.data.DataLoader(
    train_dataset,
    batch_size=32,
    shuffle=(train_sampler is None),
    sampler=train_sampler,
)
test_loader = torch.utils.data.DataLoader(test_dataset, batch_size=500)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

model = model.with_bagua([optimizer], gradient_allreduce.GradientAllReduceAlgorithm())

for epoch in range(5):
    train_sampler.set_epoch(epoch)
    model.train()
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()

model.eval()
if bagua.get_rank() == 0:
    with torch.no_grad():
        correct = sum((model(data).argmax(dim=1) == target).sum().item() for data, target in test_loader)
    print(f"accuracy {correct / len(test_dataset):.3f}")  # noqa: T201
    torch.save(model.state_dict(), "digits.pt")
