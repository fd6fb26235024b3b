package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

// checkTime bounds how long -check waits for the API server.
const checkTime = 10 * time.Second

// report prints findings and remembers whether one of them is an error.
type report struct {
	w      io.Writer
	failed bool
}

func (r *report) add(severity iptables.Severity, subject, text, fix string) {
	if severity == iptables.Error {
		r.failed = true
	}
	fmt.Fprintf(r.w, "%-8s %-13s %s\n", severity, subject, text)
	if fix != "" {
		fmt.Fprintf(r.w, "%-22s %s\n", "", "fix: "+fix)
	}
}

// result adds an error of a step, or what is in order.
func (r *report) result(subject string, err error, ok string) {
	if err == nil {
		r.add(iptables.Info, subject, ok, "")
		return
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		r.add(iptables.Error, subject, line, "")
	}
}

// check validates configuration, permissions and rules, or explains pods. It changes nothing on the node.
func check(ctx context.Context, c *Config, w io.Writer) error {
	var namespace, name string
	switch len(c.Args) {
	case 0:
	case 1:
		var ok bool
		if namespace, name, ok = strings.Cut(c.Args[0], "/"); !ok || namespace == "" || name == "" {
			return usageError{fmt.Errorf("-check takes NAMESPACE/POD, not %q", c.Args[0])}
		}
	default:
		return usageError{fmt.Errorf("-check takes one NAMESPACE/POD, behind all flags, not %q", c.Args)}
	}
	r := &report{w: w}
	if err := c.Validate(); err != nil {
		r.result("configuration", err, "")
		return errFindings
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	quiet := slog.New(slog.DiscardHandler)

	policy := c.Policy
	issuer, issuerErr := newIssuer(ctx, c, &policy, func(context.Context, string, string, string) (string, error) {
		return "", errors.New("-check asks for no token")
	}, quiet, prometheus.NewRegistry())
	kube, err := watchPods(ctx, c, &policy, quiet)
	if err == nil {
		defer kube.stop()
		err = kube.pods.WaitSynced(ctx)
	}
	if namespace != "" || c.All {
		if err != nil {
			return err
		}
		return explain(kube.pods, namespace, name, w)
	}

	r.result("configuration", nil, "valid")
	r.result("state", stateDir(c.StateDir), "-state-dir can be used")
	if err == nil {
		r.result("pods", kube.pods.NodeExists(ctx), fmt.Sprintf("%d pods are bound to node %s", len(kube.pods.All()), c.Node))
	} else {
		r.result("pods", err, "")
	}
	if issuerErr == nil {
		issuerErr = issuer.Check(ctx)
	}
	r.result("sts", issuerErr, "reachable with "+policy.Issuer)
	if c.Redirect != "none" || c.Guard {
		rules, err := iptables.New(c.rules(quiet, prometheus.NewRegistry()))
		if err != nil {
			return err
		}
		for _, f := range rules.Check(ctx) {
			r.add(f.Severity, strings.TrimSpace(f.Subject+" "+f.Family), f.Text, f.Fix)
		}
	}
	if r.failed {
		return errFindings
	}
	return nil
}

// watch is a Pods that runs.
type watch struct {
	pods *pods.Pods
	stop func()
}

func watchPods(ctx context.Context, c *Config, policy *proxy.Policy, log *slog.Logger) (watch, error) {
	config, err := pods.LoadConfig(c.Kubeconfig)
	if err != nil {
		return watch{}, err
	}
	p, err := pods.New(pods.Options{Config: config, Node: c.Node, Policy: policy, Log: log, Metrics: prometheus.NewRegistry(), CNIResults: c.CNIResults})
	if err != nil {
		return watch{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = p.Run(ctx)
	}()
	return watch{pods: p, stop: func() { cancel(); <-done }}, nil
}

// explain prints how the answer to one pod, or to every pod, comes about.
func explain(p *pods.Pods, namespace, name string, w io.Writer) error {
	all := p.All()
	if name != "" {
		e, ok := p.Explain(namespace, name)
		if !ok {
			return fmt.Errorf("no pod %s/%s is bound to this node: run -check on the pod's own node", namespace, name)
		}
		all = []pods.Explanation{e}
	}
	refused := false
	for _, e := range all {
		refused = refused || e.Decision != pods.DecisionGranted
		writeExplanation(w, e)
	}
	if name != "" && refused {
		return errFindings
	}
	return nil
}

func writeExplanation(w io.Writer, e pods.Explanation) {
	fmt.Fprintf(w, "%s/%s: %s\n", e.Namespace, e.Name, e.Decision)
	for _, s := range e.Steps {
		fmt.Fprintf(w, "  - %s\n", s)
	}
}

// stateDir says whether the directory can hold secrets: ours, closed to others, writable.
func stateDir(dir string) error {
	if dir == "" {
		return nil
	}
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // made at start
	}
	if err != nil {
		return fmt.Errorf("look at -state-dir: %w", err)
	}
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("-state-dir %s is %s: it must be a directory that only its owner can write to", dir, info.Mode())
	}
	f, err := os.CreateTemp(dir, ".check-")
	if err != nil {
		return fmt.Errorf("-state-dir cannot be written: %w", err)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}
