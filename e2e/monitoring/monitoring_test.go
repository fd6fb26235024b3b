package monitoring

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

const (
	alertsFile    = "../../deploy/chart/monitoring/alerts.yaml"
	dashboardFile = "../../deploy/chart/monitoring/dashboard.json"
	roleList      = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"
)

var shared *lab.Lab

func TestMain(m *testing.M) { os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l })) }

// program finds one of the programs that install.sh unpacks.
func program(t *testing.T, name string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "imdsgate-e2e", "prometheus", "usr", "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run e2e/monitoring/install.sh", err)
	}
	return path
}

// The alerts are well formed, and fire after their time in their fault only.
func TestRules(t *testing.T) {
	promtool := program(t, "promtool")
	for _, args := range [][]string{{"check", "rules", alertsFile}, {"test", "rules", "alerts_test.yaml"}} {
		if out, err := exec.CommandContext(labtest.Context(t), promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	cases, err := os.ReadFile("alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range alerts(t) {
		if !strings.Contains(string(cases), `alertname="`+a.Alert+`"`) && !strings.Contains(string(cases), "alertname: "+a.Alert+"\n") {
			t.Errorf("no case of alerts_test.yaml sees %s fire", a.Alert)
		}
	}
}

type alert struct{ Alert, Expr string }

func alerts(t *testing.T) []alert {
	t.Helper()
	b, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Groups []struct{ Rules []alert } }
	if err := yaml.Unmarshal(b, &file); err != nil || len(file.Groups) != 1 || len(file.Groups[0].Rules) == 0 {
		t.Fatalf("%s: %v: %+v", alertsFile, err, file)
	}
	return file.Groups[0].Rules
}

// scraped is a Prometheus that scrapes one daemon of the lab.
type scraped struct{ url string }

// scrape starts Prometheus on the loopback. It reaches into the lab through a listener of this process.
func scrape(t *testing.T, d *lab.Daemon) *scraped {
	t.Helper()
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := d.Ops(r.Context(), "/metrics")
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		_, _ = io.WriteString(w, text)
	}))
	t.Cleanup(target.Close)
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf("scrape_configs:\n- job_name: imdsgate-metrics\n  scrape_interval: 500ms\n  scrape_timeout: 500ms\n  static_configs: [{targets: [%q]}]\n",
		target.Listener.Addr())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program(t, "prometheus"), "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if text, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("Prometheus: %s", text)
		}
	})
	s := &scraped{url: "http://" + address}
	eventually(t, "Prometheus has scraped", func() error {
		v, err := s.query(t.Context(), `up == 1`)
		if err == nil && len(v) == 0 {
			err = fmt.Errorf("no target is up")
		}
		return err
	})
	return s
}

// query returns the values of an instant vector, NaN left out: it is no data.
func (s *scraped) query(ctx context.Context, expr string) (values []string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/api/v1/query?"+url.Values{"query": {expr}}.Encode(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct {
			ResultType string
			Result     []struct{ Value [2]any }
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" || answer.Data.ResultType != "vector" {
		return nil, fmt.Errorf("%s: %v %s %s, a %s", expr, err, answer.Status, answer.Error, answer.Data.ResultType)
	}
	for _, r := range answer.Data.Result {
		if v := fmt.Sprint(r.Value[1]); v != "NaN" {
			values = append(values, v)
		}
	}
	return values, nil
}

// eventually asks until the answer is right: Prometheus has no other way to tell that it has scraped.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within 30 s: %v", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// account makes a service account with a role that STS lets it have, or not.
func account(t *testing.T, n *lab.Node, namespace, name string, trusted bool) {
	t.Helper()
	arn := "arn:aws:iam::" + lab.Account + ":role/nobody-made-it"
	if trusted {
		var err error
		if arn, err = n.Role(name, aws.ActionListBuckets); err != nil {
			t.Fatal(err)
		}
	}
	if err := shared.ServiceAccount(labtest.Context(t), namespace, name, map[string]string{"eks.amazonaws.com/role-arn": arn}); err != nil {
		t.Fatal(err)
	}
}

// ask sends n requests from inside a pod, some at a time, and wants this status of each.
func ask(t *testing.T, p *lab.Pod, n, want int, path, host string) {
	t.Helper()
	errs := make(chan error, n)
	slots := make(chan struct{}, 20)
	for range n {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			errs <- func() error {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
				if err != nil {
					return err
				}
				req.Host = host
				resp, err := p.HTTP().Do(req)
				if err != nil {
					return err
				}
				defer resp.Body.Close()
				if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != want {
					return fmt.Errorf("%s in %s/%s: %d, want %d: %v %s", path, p.Namespace, p.Name, resp.StatusCode, want, err, body)
				}
				return nil
			}()
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// Every query of the dashboard has data, and each alert's expression comes true in its fault, not before.
func TestPrometheus(t *testing.T) {
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	account(t, n, shop, "cart", true)
	cart := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	ask(t, cart, 1, http.StatusOK, roleList+"cart", "")
	s := scrape(t, d)
	start := time.Now()

	exprs := map[string]string{}
	for _, a := range alerts(t) {
		exprs[a.Alert] = a.Expr
		for _, metric := range regexp.MustCompile(`imdsgate_\w+|\bup\b`).FindAllString(a.Expr, -1) {
			if v, err := s.query(ctx, "count("+metric+")"); err != nil || len(v) == 0 {
				t.Errorf("%s: the daemon has no %s: %v", a.Alert, metric, err)
			}
		}
		if v, err := s.query(ctx, a.Expr); err != nil || len(v) != 0 {
			t.Errorf("%s is true while all is well: %v %v", a.Alert, v, err)
		}
	}
	fires := func(t *testing.T, alert string) {
		t.Helper()
		expr, ok := exprs[alert]
		if !ok {
			t.Fatalf("no alert %s in %s", alert, alertsFile)
		}
		eventually(t, alert, func() error {
			v, err := s.query(t.Context(), expr)
			if err == nil && len(v) == 0 {
				err = fmt.Errorf("%s: nothing", expr)
			}
			return err
		})
	}

	stranger := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, Pending: true}) // never reported: nobody knows its address
	faults := []struct {
		alerts []string
		fault  func(t *testing.T)
	}{
		{[]string{"ImdsgateIdentifyFailing"}, func(t *testing.T) {
			ask(t, stranger, 100, http.StatusServiceUnavailable, roleList, "")
		}},
		{[]string{"ImdsgateDeniedSpike"}, func(t *testing.T) {
			ask(t, cart, 600, http.StatusForbidden, roleList, "rebound.example")
		}},
		{[]string{"ImdsgateRoleRefused", "ImdsgateRolesWithoutCredentials"}, func(t *testing.T) {
			account(t, n, shop, "thief", false)
			thief := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "thief"})
			ask(t, thief, 1, http.StatusForbidden, roleList, "")
		}},
		{[]string{"ImdsgateSTSFailing"}, func(t *testing.T) {
			t.Cleanup(n.AWS.Inject(aws.Unavailable()))
			for i := range 3 { // with one, it is as many calls as the thief's
				name := fmt.Sprint("late-", i)
				account(t, n, shop, name, true)
				late := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: name})
				ask(t, late, 1, http.StatusServiceUnavailable, roleList, "")
			}
		}},
		{[]string{"ImdsgateSlow"}, func(t *testing.T) {
			// Longer than any request is held: how much of it has passed when the pod asks does not matter.
			t.Cleanup(n.AWS.Inject(aws.Fault{Delay: 5 * time.Second}))
			for i := range 2 { // the histogram's series have no rate before their second sample
				name := fmt.Sprint("slow-", i)
				account(t, n, shop, name, true)
				slow := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: name})
				ask(t, slow, 1, http.StatusServiceUnavailable, roleList+name, "")
			}
		}},
		{[]string{"ImdsgateCredentialsNearExpiry"}, func(t *testing.T) {
			n.AWS.SetSessionLength(10 * time.Minute)
			t.Cleanup(func() { n.AWS.SetSessionLength(0) })
			account(t, n, shop, "short", true)
			labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "short"})
		}},
		{[]string{"ImdsgateRedirectMissing", "ImdsgateRulesContested"}, func(t *testing.T) {
			metric := func(name string) float64 {
				t.Helper()
				m, err := d.Metrics(ctx)
				if err != nil {
					t.Fatal(err)
				}
				return m[name]
			}
			repairs := func() float64 { return metric(`imdsgate_repairs_total{what="redirect"}`) }
			flush := []string{"-F", "PREROUTING"}
			take := []string{"-I", "PREROUTING", "-d", "169.254.169.254", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:8181"}
			change := func(rule []string) {
				t.Helper()
				if _, err := n.Run(ctx, "iptables", append([]string{"-t", "nat"}, rule...)...); err != nil {
					t.Fatal(err)
				}
			}
			for range 4 {
				before := repairs()
				change(flush)
				eventually(t, "the redirect is repaired", func() error {
					if now := repairs(); now == before {
						return fmt.Errorf("%v repairs", now)
					}
					return nil
				})
			}
			// Who insists on the first place has it at last: two daemons would fight for it.
			before := -1.0
			eventually(t, "the first place is left to who insists on it", func() error {
				if metric(`imdsgate_redirect_in_place{family="ipv4"}`) == 0 {
					return nil
				}
				now := repairs()
				if now != before {
					before = now
					change(take)
				}
				return fmt.Errorf("%v repairs", now)
			})
		}},
	}
	for _, f := range faults {
		t.Run(strings.Join(f.alerts, "+"), func(t *testing.T) {
			f.fault(t)
			for _, a := range f.alerts {
				fires(t, a)
			}
		})
	}

	// With a bit of everything behind it, the daemon has data for every panel.
	board := readDashboard(t)
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			eventually(t, p.Title, func() error {
				v, err := s.query(t.Context(), fill(target.Expr))
				if err == nil && len(v) == 0 {
					err = fmt.Errorf("%s: nothing", target.Expr)
				}
				return err
			})
		}
	}

	if *update {
		s.picture(t, board, start, "../../docs/dashboard.svg")
	}

	t.Run("ImdsgateDown", func(t *testing.T) {
		d.Kill()
		fires(t, "ImdsgateDown")
	})
}

// dashboard is what is read of dashboard.json.
type dashboard struct {
	Panels []struct {
		Type, Title string
		GridPos     struct{ X, Y, W, H int }
		FieldConfig struct{ Defaults struct{ Unit string } }
		Targets     []struct{ Expr, LegendFormat string }
	}
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile(dashboardFile)
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil || len(d.Panels) == 0 {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	for _, p := range d.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("%s: panel %q asks nothing", dashboardFile, p.Title)
		}
	}
	return d
}

// fill puts values in place of the dashboard's variables.
func fill(expr string) string {
	return strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*").Replace(expr)
}
