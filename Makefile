# Targets with a "##" are the contract; bare `make` prints them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# No AWS library may look for an instance role on the machine that runs the tests.
export AWS_EC2_METADATA_DISABLED := true
export CGO_ENABLED ?= 1

GOTESTSUM := go run gotest.tools/gotestsum@v1.13.0 --format pkgname --hide-summary=skipped
OUT := $(CURDIR)/e2e/out

.PHONY: help build demo demo-down test deps test-unit test-kernel test-lab test-clients test-minio bench fuzz lint cluster cluster-down cluster-bins docs

help:
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/imdsgate: static, version from build info
	CGO_ENABLED=0 go build -trimpath -buildvcs=auto -o bin/imdsgate ./cmd/imdsgate

demo: deps build ## the two scenarios of the README by the AWS CLI in pods of a lab node (root)
	cd e2e && go run ./demo

demo-down: ## nothing to do: the demo removes its lab when it ends
	@echo "the demo removes its lab when it ends"

test: deps ## everything: unit, race, kernel, lab, clients; installs what is missing; ends with totals (root)
	@rm -rf $(OUT); mkdir -p $(OUT)
	@status=0; for t in test-unit test-kernel test-lab test-clients; do \
	  echo "== make $$t"; $(MAKE) --no-print-directory $$t || status=1; done; \
	  $(CURDIR)/.ci/totals $(OUT)/*.json; exit $$status

deps: cluster-bins-lab
	@e2e/clients/install.sh

test-unit: ## no privilege, no network, under a minute warm
	@mkdir -p $(OUT)
	$(GOTESTSUM) --jsonfile $(OUT)/unit.json -- -race -short ./...

test-kernel: ## the real iptables, both back ends, in namespaces of its own
	@mkdir -p $(OUT)
	$(GOTESTSUM) --jsonfile $(OUT)/kernel.json -- -run '^TestKernel' -count=1 ./iptables/

test-lab: cluster-bins-lab ## the daemon on a lab node with a real API server (root)
	@mkdir -p $(OUT)
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/lab.json -- -count=1 -timeout 20m . ./lab/... ./aws/... ./imds/...

test-clients: cluster-bins-lab ## real AWS SDKs and CLIs in pods of a lab node (root)
	@mkdir -p $(OUT)
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/clients.json -- -count=1 -timeout 20m ./clients/...

test-minio: deps ## once with a server nobody here wrote: MinIO as STS and S3 (builds it first, about 10 minutes)
	@mkdir -p $(OUT)
	e2e/minio/build.sh
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/minio.json -- -tags minio -count=1 -timeout 15m ./minio/...

bench: ## benchmarks; ratios against a bare net/http responder in the same run
	go test -run '^$$' -bench . -benchmem ./proxy/ ./proxy/pods/ ./cache/
	go test -run '^$$' -bench CPURatio -benchtime 1x ./cmd/imdsgate

fuzz: ## ten minutes of coverage-guided fuzzing, shared among the targets
	.ci/fuzz 600

lint: ## golangci-lint (pinned), go vet, govulncheck where reachable
	go vet ./... && cd e2e && go vet ./...
	go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 run ./...
	@go run golang.org/x/vuln/cmd/govulncheck@v1.9.0 ./... || echo "lint: govulncheck could not run or found something; its database is not reachable everywhere"

cluster cluster-down:
	@echo "the cluster of several nodes is not built yet: make demo runs a lab of one node"; exit 1

cluster-bins: ## builds the lab's Kubernetes once into ~/.cache/imdsgate-e2e/bin (10 minutes), skips what is there
	@e2e/cluster/bins/build.sh

.PHONY: cluster-bins-lab
cluster-bins-lab:
	@e2e/cluster/bins/build.sh etcd kube-apiserver kubectl

docs: ## writes the flag table into the README
	go test ./cmd/imdsgate -run TestReadmeFlags -update
