package main

import (
	"cmp"
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
	"golang.org/x/sync/errgroup"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/cache/sts"
	"github.com/imdsgate/imdsgate/cmd/imdsgate/page"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

// Bounds of -check.
const (
	checkTime  = 10 * time.Second // for the API server to tell all that counts
	askTime    = time.Minute      // to ask STS for the credentials of every pod
	asksAtOnce = 8                // that STS is asked at once
)

// report prints findings and remembers whether one of them is an error.
type report struct {
	w      io.Writer
	failed bool
}

// line prints one: its mark, what it is about, what was found and what to do.
func (r *report) line(mark, about, text, fix string) {
	fmt.Fprintf(r.w, "  %-2s  %-13s %s\n", mark, about, text)
	if fix != "" {
		fmt.Fprintf(r.w, "      %-13s fix: %s\n", "", fix)
	}
}

func (r *report) add(f page.Finding) {
	mark := map[string]string{string(iptables.Info): "ok", string(iptables.Warning): "! "}[f.Severity]
	if f.Severity == string(iptables.Error) {
		r.failed, mark = true, "!!"
	}
	r.line(mark, f.About, f.Text, f.Fix)
}

// result adds an error of a step, or what is in order.
func (r *report) result(about string, err error, ok string) {
	if err == nil {
		r.add(page.Finding{Severity: string(iptables.Info), About: about, Text: ok})
		return
	}
	if issue, is := errors.AsType[*cache.IssueError](err); is {
		text, fix := page.Words(issue)
		r.add(page.Finding{Severity: string(iptables.Error), About: about, Text: text, Fix: fix})
		return
	}
	for _, line := range lines(err) {
		r.add(page.Finding{Severity: string(iptables.Error), About: about, Text: line})
	}
}

// checker is one run of -check.
type checker struct {
	config  *Config
	policy  proxy.Policy
	issuer  *sts.STS
	pods    *pods.Pods
	running *page.View // of the instance on this node; nil: none
	w       io.Writer
}

// check validates configuration, permissions and rules, or explains pods. It changes nothing on the node. Where an instance
// runs, its settings count, unless others are given.
func (a app) check(ctx context.Context, c *Config, args []string, getenv func(string) string) error {
	k := &checker{config: c, running: running(ctx, c.ProbeSocket), w: a.stdout}
	if k.running != nil {
		set, err := parseConfig(args, asSet(k.running, getenv), io.Discard)
		if err != nil {
			return usageError{err}
		}
		k.config = set
	}
	return k.run(ctx)
}

func (k *checker) run(ctx context.Context) error {
	c := k.config
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
	r := &report{w: k.w}
	if err := c.Validate(); err != nil {
		r.result("configuration", err, "")
		return errFindings
	}
	if c.surveys() && name == "" {
		return survey(ctx, c, k.w)
	}
	quiet := slog.New(slog.DiscardHandler)
	k.policy = c.Policy
	var issuerErr error
	k.issuer, issuerErr = newIssuer(ctx, c, &k.policy, func(ctx context.Context, namespace, serviceAccount, audience string) (string, error) {
		return k.pods.Token(ctx, namespace, serviceAccount, audience)
	}, quiet, prometheus.NewRegistry())
	stop, err := k.watchPods(ctx, quiet)
	if err == nil {
		defer stop()
		err = k.waitSynced(ctx)
	}
	if namespace != "" || c.All {
		if k.pods == nil || err != nil && len(k.pods.All()) == 0 {
			return err
		}
		if issuerErr != nil {
			r.result("sts", issuerErr, "")
		}
		ready := k.serving(r)
		if err := k.explain(ctx, namespace, name); err != nil {
			return err
		}
		return ready
	}

	asking, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	k.instance(r)
	r.result("configuration", nil, "valid")
	r.result("state", stateDir(c.StateDir), "-state-dir can be used")
	if err == nil {
		r.result("pods", k.pods.NodeExists(asking), fmt.Sprintf("%d pods are bound to node %s; -check -all explains each", k.pods.Bound(), c.Node))
		if err := k.pods.CanReport(asking); err != nil {
			r.add(page.Finding{
				Severity: string(iptables.Warning), About: "events", Text: err.Error(),
				Fix: "let its ClusterRole create and patch events: without them nobody but the operator hears why a pod got nothing",
			})
		}
	} else {
		r.result("pods", err, "")
	}
	if issuerErr == nil {
		issuerErr = k.issuer.Check(asking)
	}
	r.result("sts", issuerErr, "reachable with "+k.policy.Issuer)
	if c.Redirect != "none" || c.Guard {
		rules, err := iptables.New(c.rules(quiet, prometheus.NewRegistry()))
		if err != nil {
			return err
		}
		for _, f := range findings(rules.Check(ctx), c.Redirect == "none") {
			r.add(f)
		}
	}
	if r.failed {
		return errFindings
	}
	return nil
}

// waitSynced waits for all that counts, but not where the API server keeps refusing: then its error says what.
func (k *checker) waitSynced(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	for failing := false; ; failing = k.pods.Err() != nil {
		look, stop := context.WithTimeout(ctx, time.Second)
		err := k.pods.WaitSynced(look)
		stop()
		if err == nil || ctx.Err() != nil || failing && k.pods.Err() != nil {
			return err
		}
	}
}

// instance reports on the one that runs.
func (k *checker) instance(r *report) {
	v := k.running
	if v == nil {
		r.add(page.Finding{
			Severity: string(iptables.Warning), About: "instance", Text: "none answers on this node: flags and environment of this command count",
			Fix: "run -check in the container of imdsgate, or start it; -probe-socket is where it answers",
		})
		return
	}
	attention := 0
	for _, p := range v.Pods {
		if p.Status.Attention() {
			attention++
		}
	}
	text := fmt.Sprintf("imdsgate %s runs for %s, %d of its %d pods need attention", v.Version, page.Span(v.Now.Sub(v.Started)), attention, len(v.Pods))
	if attention > 0 {
		r.add(page.Finding{Severity: string(iptables.Warning), About: "instance", Text: text, Fix: "-check -all says which and why"})
	} else {
		r.result("instance", nil, text)
	}
	for _, missing := range v.NotReady {
		r.add(page.Finding{Severity: string(iptables.Error), About: "instance", Text: "not ready: " + missing})
	}
}

// serving tells, above the pods, what keeps the node's instance from answering any of them.
func (k *checker) serving(r *report) error {
	if k.running == nil {
		r.line("--", "instance", "none answers at -probe-socket: where none runs nobody is served, and what follows is what one with these settings would do", "")
		return nil
	}
	for _, missing := range k.running.NotReady {
		r.add(page.Finding{Severity: string(iptables.Error), About: "instance", Text: "not ready: " + missing})
	}
	failed := r.failed
	for _, trouble := range k.running.Troubles {
		r.add(page.Finding{Severity: string(iptables.Warning), About: "instance", Text: trouble})
	}
	for _, f := range k.running.Rules {
		if f.Severity != string(iptables.Info) {
			r.add(f)
		}
	}
	if failed {
		return errFindings
	}
	return nil
}

// watchPods starts to follow the API server; stop ends it.
func (k *checker) watchPods(ctx context.Context, log *slog.Logger) (stop func(), err error) {
	config, err := pods.LoadConfig(k.config.Kubeconfig)
	if err != nil {
		return nil, err
	}
	k.pods, err = pods.New(pods.Options{
		Config: config, Node: k.config.Node, Policy: &k.policy, Log: log, Metrics: prometheus.NewRegistry(), CNIResults: k.config.CNIResults,
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = k.pods.Run(ctx)
	}()
	return func() { cancel(); <-done }, nil
}

// explain prints how the answer to one pod, or to every pod, comes about.
func (k *checker) explain(ctx context.Context, namespace, name string) error {
	all := k.pods.All()
	if name != "" {
		e, ok := k.pods.Explain(namespace, name)
		if !ok {
			return k.notHere(ctx, namespace, name)
		}
		all = []pods.Explanation{e}
	}
	list := k.withCredentials(ctx, all)
	page.Sort(list)
	attention := 0
	for _, p := range list {
		k.print(p)
		if p.Status.Attention() {
			attention++
		}
	}
	if name != "" {
		if s := list[0].Status; s != page.Served && s != page.Elsewhere {
			return errFindings
		}
		return nil
	}
	fmt.Fprintf(k.w, "%d pods on node %s, %d need attention\n", len(list), k.config.Node, attention)
	if attention > 0 {
		return errFindings
	}
	return nil
}

// notHere says where a pod is that is not on this node.
func (k *checker) notHere(ctx context.Context, namespace, name string) error {
	node, err := k.pods.Locate(ctx, namespace, name)
	switch {
	case err != nil:
		return fmt.Errorf("no pod %s/%s is bound to node %s: %w", namespace, name, k.config.Node, err)
	case node == "":
		return fmt.Errorf("no node: pod %s/%s is not scheduled yet", namespace, name)
	}
	return fmt.Errorf("pod %s/%s is bound to node %s, this is %s: run -check in the imdsgate pod of that node; if there is none, nobody there serves it, "+
		"and only the guard or IMDSv2's hop limit keeps the node's role from it", namespace, name, node, k.config.Node)
}

// withCredentials adds what the running instance has for each pod. Where it does not know, STS is asked: once for each key,
// and what it gives is thrown away.
func (k *checker) withCredentials(ctx context.Context, all []pods.Explanation) []page.Pod {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	now := time.Now()
	entries := make([]*cache.Entry, len(all))
	ask := map[cache.Key][]int{}
	for i, e := range all {
		if e.Key == nil {
			continue
		}
		if entries[i] = known(k.running, e.UID); entries[i] == nil && e.Prefetch && k.issuer != nil {
			ask[*e.Key] = append(ask[*e.Key], i)
		}
	}
	var g errgroup.Group
	g.SetLimit(asksAtOnce)
	for key, pods := range ask {
		g.Go(func() error {
			entry := k.ask(ctx, key)
			for _, i := range pods {
				entries[i] = entry
			}
			return nil
		})
	}
	_ = g.Wait()
	list := make([]page.Pod, len(all))
	for i, e := range all {
		list[i] = page.NewPod(e, entries[i], now)
	}
	return list
}

// ask asks STS for the credentials of a key.
func (k *checker) ask(ctx context.Context, key cache.Key) *cache.Entry {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	issued, err := k.issuer.Issue(ctx, key)
	if err != nil {
		return &cache.Entry{Key: key, State: cache.Failed, Err: err}
	}
	return &cache.Entry{Key: key, State: cache.Ready, Expires: issued.Expires}
}

func (k *checker) print(p page.Pod) {
	fmt.Fprintf(k.w, "%s/%s: %s\n", p.Namespace, p.Name, cmp.Or(p.Status, page.Status(p.Decision)))
	r := report{w: k.w}
	for _, s := range p.Steps {
		r.line(string(s.Mark), s.About, s.Text, s.Fix)
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
