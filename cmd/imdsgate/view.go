package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/cmd/imdsgate/page"
	"github.com/imdsgate/imdsgate/iptables"
)

var _ page.Source = (*daemon)(nil)

// View is what the status page shows now.
func (d *daemon) View(ctx context.Context) *page.View {
	return &page.View{
		Node: d.config.Node, Version: version(), Issuer: d.config.Policy.Issuer, Now: time.Now(), Started: d.started,
		NotReady: lines(d.ready(ctx)), Troubles: d.troubles(), Rules: d.seen.rules(ctx, d), Pods: d.Pods(),
		Denials: d.server.Denials(), Flags: d.config.InEffect,
	}
}

// troubles are what the API server says, or does not say, that somebody should look at.
func (d *daemon) troubles() []string {
	all := lines(d.pods.Err())
	if err := d.nodeErr.Load(); err != nil {
		all = append(all, lines(*err)...)
	}
	return all
}

// Pods are those of this node, with their credentials.
func (d *daemon) Pods() []page.Pod {
	now := time.Now()
	entries := map[cache.Key]cache.Entry{}
	for e := range d.cache.Snapshot() {
		entries[e.Key] = e
	}
	all := d.pods.All()
	list := make([]page.Pod, 0, len(all))
	for _, e := range all {
		var entry *cache.Entry
		if e.Key != nil {
			if found, ok := entries[*e.Key]; ok {
				entry = &found
			}
		}
		list = append(list, page.NewPod(e, entry, now))
	}
	return list
}

// lines are the errors that are joined in err.
func lines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

// seenRules keeps what was found about the rules for a moment: to look runs iptables, and a page may ask every other second.
type seenRules struct {
	mu    sync.Mutex
	at    time.Time
	found []page.Finding
}

const (
	rulesFor  = 10 * time.Second // that a look is good for
	rulesTime = 2 * time.Second  // that it may take: somebody may hold the xtables lock
)

func (s *seenRules) rules(ctx context.Context, d *daemon) []page.Finding {
	if d.config.Redirect == "none" && !d.config.Guard {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) < rulesFor {
		return s.found
	}
	// Not the request's: a browser that leaves must not make the next one see half of it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rulesTime)
	defer cancel()
	found := findings(d.rules.Check(ctx), d.config.Redirect == "none")
	if ctx.Err() != nil {
		found = []page.Finding{{Severity: string(iptables.Warning), About: "rules", Text: "cannot be looked at now: somebody holds the xtables lock"}}
		if err := d.rules.Verified(); err != nil {
			found = append(found, page.Finding{Severity: string(iptables.Error), About: "rules", Text: err.Error()})
		}
	}
	s.at, s.found = time.Now(), found
	return found
}

// findings are those of iptables, without the redirect's when it is somebody else's job.
func findings(all []iptables.Finding, noRedirect bool) []page.Finding {
	list := make([]page.Finding, 0, len(all))
	for _, f := range all {
		if noRedirect && f.Subject == "redirect" && f.Severity == iptables.Warning {
			continue
		}
		list = append(list, page.Finding{Severity: string(f.Severity), About: strings.TrimSpace(f.Subject + " " + f.Family), Text: f.Text, Fix: f.Fix})
	}
	return list
}

// inEffect lists the settings, with what other variables said of -node and -host-ip.
func (c *Config) inEffect(fs *flag.FlagSet) (all []page.Flag) {
	var ips []string
	for _, ip := range c.HostIPs {
		ips = append(ips, ip.String())
	}
	found := map[string]string{"node": c.Node, "host-ip": strings.Join(ips, ",")}
	fs.VisitAll(func(f *flag.Flag) {
		if oneShot(f.Name) {
			return
		}
		value, ok := found[f.Name]
		if !ok {
			value = f.Value.String()
		}
		all = append(all, page.Flag{Name: f.Name, Value: value, Default: value == f.DefValue})
	})
	return all
}

// running asks the instance that runs on this node for its View, over its socket; nil: none answers.
func running(ctx context.Context, socket string) *page.View {
	if socket == "" {
		return nil
	}
	body, status, err := askSocket(ctx, socket, "/debug/status", 32<<20)
	if err != nil || status != http.StatusOK {
		return nil
	}
	v := new(page.View)
	if json.Unmarshal(body, v) != nil {
		return nil
	}
	return v
}

// askSocket asks the running instance.
func askSocket(ctx context.Context, socket, path string, limit int64) (body []byte, status int, err error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://imdsgate"+path, nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := client.Do(r)
	if err != nil {
		return nil, 0, fmt.Errorf("no instance answers at %s (-probe-socket): %w", socket, err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(io.LimitReader(resp.Body, limit)); err != nil {
		return nil, 0, fmt.Errorf("read the answer: %w", err)
	}
	return body, resp.StatusCode, nil
}

// asSet is getenv with the settings of a running instance behind it, so that -check in its container judges by them: what was
// given to the DaemonSet as arguments is not given to kubectl exec.
func asSet(v *page.View, getenv func(string) string) func(string) string {
	set := map[string]string{}
	for _, f := range v.Flags {
		if !f.Default {
			set[envName(f.Name)] = f.Value
		}
	}
	return func(name string) string {
		if own := getenv(name); own != "" {
			return own
		}
		return set[name]
	}
}

// known are the credentials that the running instance has for a pod, as its cache tells of them.
func known(v *page.View, uid string) *cache.Entry {
	if v == nil {
		return nil
	}
	for _, p := range v.Pods {
		if c := p.Credentials; p.UID == uid && c != nil && c.State != cache.Pending {
			e := &cache.Entry{State: c.State, Issued: c.Issued, Expires: c.Expires, NextIssue: c.NextRefresh}
			if c.Error != "" {
				e.Err = &cache.IssueError{Err: errors.New(c.Error), Hint: c.Fix}
			}
			return e
		}
	}
	return nil
}
