package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/bench/report"
	"github.com/imdsgate/imdsgate/e2e/lab"
)

const (
	keys    = 250
	segment = 4 * time.Second
	// sessionLength makes refreshes due 56 to 68 s after their issue: half a session's life, give or take a tenth. The issue takes
	// 25 s at the default -sts-rate, so the first are due 31 s after the last session was issued.
	sessionLength = 124 * time.Second
	churnEvery    = 600 * time.Millisecond // 100 pods a minute
	churnLife     = 5 * time.Second
)

var asking = loading{sequence: "document", imds: 2, reuse: "keep", connections: 16, rate: 500}

// phase is what else the daemon has to do in a segment.
type phase int

const (
	quiet phase = iota
	refreshing
	churning
	phases
)

func (p phase) String() string {
	return [phases]string{"quiet", "refresh of 250 keys", "100 pods a minute"}[p]
}

// disturb asks a daemon with 250 sessions while these are refreshed and while pods come and go, and a bare responder at the same
// time, in segments whose phase is told by what did happen in them.
func (r *rig) disturb(ctx context.Context) (report.Section, error) {
	before := busy()
	n, err := r.addNode(ctx)
	if err != nil {
		return report.Section{}, err
	}
	n.AWS.SetSessionLength(sessionLength)
	c := &crowd{lab: r.lab, node: n}
	if err := c.fill(ctx); err != nil {
		return report.Section{}, err
	}
	if err := r.lab.ServiceAccount(ctx, crowded, "asker", map[string]string{roleAnnotation: roleARN("cart")}); err != nil {
		return report.Section{}, err
	}
	pod, err := addPod(ctx, n, lab.PodSpec{Namespace: crowded, ServiceAccount: "asker"})
	if err != nil {
		return report.Section{}, err
	}
	d, err := n.StartDaemon(ctx)
	if err != nil {
		return report.Section{}, err
	}
	issued := func(call aws.Call) bool { return call.Operation == "AssumeRole" && call.Outcome == aws.OK }
	starting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := n.AWS.WaitCalls(starting, keys+1, issued); err != nil {
		return report.Section{}, fmt.Errorf("the first sessions: %w", err)
	}

	ours := target{"imdsgate", &server{pid: d.PID()}, pod, 80}
	var got, bare [phases]series
	short := *r
	short.length = segment - 500*time.Millisecond
	for i, start := 0, time.Now(); time.Since(start) < sessionLength+20*time.Second; i++ { // both refreshes of everything
		p := quiet
		if i%3 == 2 { // among the others: the machine is not the same all the time
			p = churning
		}
		before := len(n.AWS.Calls())
		var mine, theirs measurement
		g, gctx := errgroup.WithContext(ctx)
		g.Go(func() (err error) { mine, err = short.ask(gctx, ours, asking); return err })
		g.Go(func() (err error) { theirs, err = short.ask(gctx, r.bare[0], asking); return err })
		if p == churning {
			g.Go(func() error { return c.churn(gctx, segment) })
		}
		if err := g.Wait(); err != nil {
			return report.Section{}, err
		}
		if calls := len(n.AWS.Calls()) - before; calls > 10 {
			if p == churning {
				continue // both at once
			}
			p = refreshing
		}
		got[p], bare[p] = append(got[p], mine), append(bare[p], theirs)
		fmt.Printf("%s: p99 %v, bare %v\n", p, mine.P99, theirs.P99)
	}

	s := report.Section{
		ID: "disturb", Title: "While sessions are refreshed and pods come and go",
		Text: fmt.Sprintf(`A daemon with %d pods, service accounts and sessions on a node of their own, asked for one document %.0f times a second over 16
connections, open loop, for segments of %v: quiet ones, such in which the daemon refreshes its sessions (all %d within 40 s, with
the default -sts-rate and -issuer; with sessions of an hour it takes minutes), and such in which pods come and go; those with both
are left out. A bare responder is asked in the same segments: what it suffers is the machine's, on which the API server and the
stand-in for AWS run as well. Figures are medians of the segments. The machine's load average before was %s.`, keys, asking.rate, segment, keys, before),
	}
	table := report.Table{Head: []string{"", "segments", "imdsgate p50", "p99", "bare p50", "p99"}}
	for p := range phases {
		if len(got[p]) == 0 {
			return s, fmt.Errorf("there was no segment of %s", p)
		}
		cells := []string{p.String(), strconv.Itoa(len(got[p]))}
		for _, m := range []series{got[p], bare[p]} {
			cells = append(cells, fmt.Sprintf("%.0f µs", float64(m.median(p50).Nanoseconds())/1e3), fmt.Sprintf("%.0f µs", float64(m.median(p99).Nanoseconds())/1e3))
		}
		table.Rows = append(table.Rows, cells)
		if p == quiet {
			continue
		}
		reference := float64(bare[p].median(p99)) / float64(bare[quiet].median(p99))
		s.Bars = append(s.Bars, report.Bar{
			What: "p99 during " + p.String(), Value: float64(got[p].median(p99)) / float64(got[quiet].median(p99)), Max: 1.5, Unit: "×",
			Noise: &report.Range{Min: min(1, reference), Max: max(1, reference)}, Note: "against quiet; error bar: the bare responder's own",
		})
	}
	s.Tables = []report.Table{table}
	return s, nil
}

const crowded = "crowd"

// crowd are pods that are objects alone.
type crowd struct {
	lab  *lab.Lab
	node *lab.Node
	n    int
}

// fill makes a service account with a role for every key, and a pod of each.
func (c *crowd) fill(ctx context.Context) error {
	if err := c.lab.Namespace(ctx, crowded, map[string]string{"iam.amazonaws.com/allowed-roles": `["` + roleARN("cart") + `"]`}); err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(8)
	for i := range keys {
		c.n++
		n := c.n
		g.Go(func() error {
			name := "app-" + strconv.Itoa(i)
			if err := c.lab.ServiceAccount(ctx, crowded, name, map[string]string{roleAnnotation: roleARN("cart")}); err != nil {
				return err
			}
			_, err := c.add(ctx, n, name)
			return err
		})
	}
	return g.Wait()
}

// add makes the nth pod, running.
func (c *crowd) add(ctx context.Context, n int, account string) (name string, err error) {
	pods := c.lab.Kube.CoreV1().Pods(crowded)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "crowd-" + strconv.Itoa(n)},
		Spec: corev1.PodSpec{
			NodeName: c.node.Name, ServiceAccountName: account,
			Containers: []corev1.Container{{Name: "main", Image: "none"}},
		},
	}
	if pod, err = pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return "", err
	}
	now := metav1.Now()
	ip := fmt.Sprintf("10.250.%d.%d", n/250, 1+n%250)
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &now, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}, HostIP: c.node.IP.String()}
	_, err = pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{})
	return pod.Name, err
}

// churn lets pods of the first service accounts come and go for a time.
func (c *crowd) churn(ctx context.Context, length time.Duration) error {
	tick := time.NewTicker(churnEvery)
	defer tick.Stop()
	var alive []string
	remove := func() error {
		grace := int64(0)
		name := alive[0]
		alive = alive[1:]
		return c.lab.Kube.CoreV1().Pods(crowded).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace})
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		c.n++
		name, err := c.add(ctx, c.n, "app-"+strconv.Itoa(c.n%keys))
		if err != nil {
			return err
		}
		if alive = append(alive, name); len(alive) > int(churnLife/churnEvery) {
			if err := remove(); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	var errs []error
	for len(alive) > 0 {
		errs = append(errs, remove())
	}
	return errors.Join(errs...)
}
