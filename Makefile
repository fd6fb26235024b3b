# Targets with a "##" are the contract; bare `make` prints them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# No AWS library may look for an instance role on the machine that runs the tests.
export AWS_EC2_METADATA_DISABLED := true
export CGO_ENABLED ?= 1

GOTESTSUM := go run gotest.tools/gotestsum@v1.13.0 --format pkgname --hide-summary=skipped
OUT := $(CURDIR)/e2e/out

.PHONY: help build demo demo-down test deps test-unit test-kernel test-lab test-hostile test-clients test-cluster test-faults test-torture test-minio bench fuzz lint \
  cluster cluster-down cluster-bins docs

help:
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/imdsgate and bin/imdsgate-load: static, version from build info
	CGO_ENABLED=0 go build -trimpath -buildvcs=auto -o bin/ ./cmd/...

demo: cluster-bins ## a real cluster in network namespaces, the chart, two pods a node: what the AWS CLI says in each; leaves it up (root)
	@e2e/cluster/demo.sh

demo-down: cluster-down ## removes the demo's cluster

test: deps ## everything: unit, race, kernel, lab, hostile, clients, cluster; installs what is missing; ends with totals (root)
	@rm -rf $(OUT); mkdir -p $(OUT)
	@status=0; for t in test-unit test-kernel test-lab test-hostile test-clients test-cluster; do \
	  echo "== make $$t"; $(MAKE) --no-print-directory $$t || status=1; done; \
	  $(CURDIR)/.ci/totals $(OUT)/*.json || status=1; exit $$status

deps: cluster-bins
	@e2e/clients/install.sh
	@e2e/monitoring/install.sh
	@e2e/page/install.sh
	@e2e/cluster/cluster.sh deps

test-unit: ## no privilege, no network, under a minute warm
	@mkdir -p $(OUT)
	$(GOTESTSUM) --jsonfile $(OUT)/unit.json -- -race -short ./...
	$(GOTESTSUM) --jsonfile $(OUT)/alloc.json -- -run Alloc ./proxy ./cache # they see nothing with -race

test-kernel: ## the real iptables, both back ends, in namespaces of its own
	@mkdir -p $(OUT)
	$(GOTESTSUM) --jsonfile $(OUT)/kernel.json -- -run '^TestKernel' -count=1 ./iptables/

test-lab: cluster-bins ## the daemon on a lab node with a real API server; chart, status page, alerts, broken set-ups (root)
	@mkdir -p $(OUT)
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/lab.json -- -count=1 -timeout 20m . ./lab/... ./aws/... ./imds/... ./deploy/... ./monitoring/... \
	  ./broken/... ./page/... ./growth/... ./bench/...

test-hostile: cluster-bins ## attacks from inside pods: 6,000 requests, packets, floods (root)
	@mkdir -p $(OUT)
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/hostile.json -- -count=1 -timeout 15m ./hostile/...

test-clients: cluster-bins ## real AWS SDKs and CLIs in pods of a lab node (root)
	@mkdir -p $(OUT)
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/clients.json -- -count=1 -timeout 20m ./clients/...

test-cluster: cluster-bins ## the chart on a real cluster of real kubelets, and what it does in quick faults (root)
	@mkdir -p $(OUT)
	@cd e2e; status=0; for p in clustertest scenarios faults; do \
	  $(GOTESTSUM) --format standard-verbose --jsonfile $(OUT)/$$p.json -- -count=1 -p 1 -timeout 40m ./$$p/... || status=1; done; exit $$status

test-faults: deps ## every fault, in its full length, on a real cluster: half an hour; writes docs/faults.md (root)
	@mkdir -p $(OUT)
	cd e2e && FAULTS=long $(GOTESTSUM) --format standard-verbose --jsonfile $(OUT)/faults.test.json -- -count=1 -timeout 60m ./faults/...
	cp $(OUT)/faults.md docs/

test-torture: deps ## 1,000 pods of real kubelets through 14 addresses, each trying what the last holder left (root)
	@mkdir -p $(OUT)
	cd e2e && REUSE_PODS=1000 $(GOTESTSUM) --format standard-verbose --jsonfile $(OUT)/torture.json -- -count=1 -run TestScenarioReuse -timeout 60m ./scenarios/

test-minio: deps ## once with a server nobody here wrote: MinIO as STS and S3 (builds it first, about 10 minutes)
	@mkdir -p $(OUT)
	e2e/minio/build.sh
	cd e2e && $(GOTESTSUM) --jsonfile $(OUT)/minio.json -- -tags minio -count=1 -timeout 15m ./minio/...

bench: deps ## the whole comparison, half an hour: hit path, bare responder, growth with the cluster, STS; writes docs/bench.md and its plots (root)
	@mkdir -p $(OUT); rm -f $(OUT)/bench.json
	go test -run '^$$' -bench . -benchmem ./proxy/ ./proxy/pods/ ./cache/
	go test -run '^$$' -bench CPURatio -benchtime 1x ./cmd/imdsgate
	cd e2e && go run ./bench -out $(OUT)
	cd e2e && for b in Cluster 'Daemons|STS'; do go test ./growth -run '^$$' -bench "$$b" -benchtime 1x -timeout 30m; done # an API server each
	cp $(OUT)/bench.md $$(grep -o '[a-z0-9-]*\.svg' $(OUT)/bench.md | sort -u | sed 's#^#$(OUT)/#') docs/

fuzz: ## ten minutes of coverage-guided fuzzing, shared among the targets
	.ci/fuzz 600

lint: ## golangci-lint and actionlint (pinned), go vet, govulncheck where reachable
	go vet ./... && cd e2e && go vet ./...
	go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
	go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 run ./...
	@go run golang.org/x/vuln/cmd/govulncheck@v1.9.0 ./... || echo "lint: govulncheck could not run or found something; its database is not reachable everywhere"

cluster: cluster-bins ## the lab cluster alone: NODES=2; prints the kubeconfig's path (root)
	@e2e/cluster/cluster.sh up $(or $(NODES),2)

cluster-down: ## removes the cluster and whatever a dead run left of it
	@e2e/cluster/cluster.sh down

cluster-bins: ## builds the lab's Kubernetes once into ~/.cache/imdsgate-e2e/bin (12 minutes), skips what is there
	@e2e/cluster/bins/build.sh

docs: ## writes what is generated: the README's flags, the help, THIRD_PARTY_LICENSES, the table of docs/diagnosis.md (root)
	go test ./cmd/imdsgate -run 'TestReadmeFlags|TestVersionAndHelp|TestLicenses' -update
	cd e2e && go test ./broken -run TestDocs -update
