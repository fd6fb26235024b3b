package e2e_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// What annotations and flags ask of STS, a strict STS gets.
func TestLabSessions(t *testing.T) {
	t.Parallel()
	const base = "arn:aws:iam::" + lab.Account + ":role/"
	bearer := aws.Trust{AWS: lab.NodeRoleARN, Actions: []string{aws.ActionAssumeRole, aws.ActionTagSession}}
	for name, c := range map[string]struct {
		flags                   []string
		roles                   func(namespace string) []aws.Role
		account, pod, namespace map[string]string
		role                    string // whose credentials the pod gets
		session                 string // name of the session; %s is namespace and node in it
		duration                time.Duration
		paths                   []string // of the real endpoint that the daemon needs beside the node role
	}{
		"external ID": {
			roles: func(string) []aws.Role {
				return []aws.Role{{ARN: base + "app", Trust: []aws.Trust{{AWS: lab.NodeRoleARN, ExternalID: "s3cr3t-1"}}}}
			},
			account: map[string]string{roleAnnotation: base + "app", "imdsgate.dev/external-id": "s3cr3t-1"},
			role:    base + "app",
		},
		"session tags": {
			flags: []string{"-session-tags", "-cluster-name", "blue"},
			roles: func(namespace string) []aws.Role {
				trust := bearer
				trust.RequestTags = map[string]string{"eks-cluster-name": "blue", "kubernetes-namespace": namespace, "kubernetes-service-account": "app"}
				return []aws.Role{{ARN: base + "app", Trust: []aws.Trust{trust}}}
			},
			account: map[string]string{roleAnnotation: base + "app"},
			role:    base + "app",
		},
		"intermediate role": {
			flags: []string{"-intermediate-role-arn", base + "hop"},
			roles: func(string) []aws.Role {
				return []aws.Role{
					{ARN: base + "hop", Trust: []aws.Trust{bearer}},
					{ARN: base + "app", Trust: []aws.Trust{{AWS: base + "hop"}}},
				}
			},
			account: map[string]string{roleAnnotation: base + "app"},
			role:    base + "app",
		},
		"session duration": {
			roles:   func(string) []aws.Role { return []aws.Role{{ARN: base + "app", Trust: []aws.Trust{bearer}}} },
			account: map[string]string{roleAnnotation: base + "app", "imdsgate.dev/session-duration": "45m"},
			role:    base + "app", duration: 45 * time.Minute,
		},
		"short name": {
			flags:   []string{"-base-role-arn", base},
			roles:   func(string) []aws.Role { return []aws.Role{{ARN: base + "team/app", Trust: []aws.Trust{bearer}}} },
			account: map[string]string{roleAnnotation: "team/app"},
			role:    base + "team/app",
		},
		"short name, base from the instance profile": {
			flags:   []string{"-base-role-arn", "auto"},
			roles:   func(string) []aws.Role { return []aws.Role{{ARN: base + "app", Trust: []aws.Trust{bearer}}} },
			account: map[string]string{roleAnnotation: "app"},
			role:    base + "app", paths: []string{"iam/info"},
		},
		"default role": {
			flags:     []string{"-default-role", base + "least"},
			roles:     func(string) []aws.Role { return []aws.Role{{ARN: base + "least", Trust: []aws.Trust{bearer}}} },
			namespace: map[string]string{},
			role:      base + "least",
		},
		"kube2iam's annotations": {
			flags: []string{"-pod-annotations"},
			roles: func(string) []aws.Role {
				return []aws.Role{{ARN: base + "app", Trust: []aws.Trust{{AWS: lab.NodeRoleARN, ExternalID: "x-1"}}}}
			},
			pod:       map[string]string{"iam.amazonaws.com/role": base + "app", "iam.amazonaws.com/external-id": "x-1"},
			namespace: map[string]string{"iam.amazonaws.com/allowed-roles": `["` + base + `a*"]`},
			role:      base + "app",
		},
		"kiam's annotations": {
			flags:     []string{"-pod-annotations", "-namespace-policy", "regexp"},
			roles:     func(string) []aws.Role { return []aws.Role{{ARN: base + "app", Trust: []aws.Trust{bearer}}} },
			pod:       map[string]string{"iam.amazonaws.com/role": base + "app", "iam.amazonaws.com/session-name": "reports@x"},
			namespace: map[string]string{"iam.amazonaws.com/permitted": ".*role/ap+"},
			role:      base + "app", session: "reports",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{})
			namespace := shared.Unique("team")
			for _, r := range c.roles(namespace) {
				if r.Allow == nil {
					r.Allow = []string{"sts:AssumeRole"}
				}
				if err := n.AWS.SetRole(r); err != nil {
					t.Fatal(err)
				}
			}
			if c.namespace == nil {
				c.namespace = map[string]string{"iam.amazonaws.com/allowed-roles": `["` + base + `*"]`}
			}
			if err := shared.Namespace(ctx, namespace, c.namespace); err != nil {
				t.Fatal(err)
			}
			if err := shared.ServiceAccount(ctx, namespace, "app", c.account); err != nil {
				t.Fatal(err)
			}
			labtest.Daemon(t, n, c.flags...)
			p := labtest.Pod(t, n, lab.PodSpec{Namespace: namespace, ServiceAccount: "app", Annotations: c.pod})
			doc := served(t, n, p, c.role)
			owner, _ := n.AWS.Owner(doc.AccessKeyId)
			session := namespace + ".app@" + n.Name
			if c.session != "" {
				session = c.session
			}
			if owner.SessionName != session && !(c.session != "" && strings.HasPrefix(owner.SessionName, c.session) && !strings.Contains(owner.SessionName, "@")) {
				t.Errorf("the session is called %s, want %s", owner.SessionName, session)
			}
			want := time.Hour
			if c.duration != 0 {
				want = c.duration
			}
			if left := time.Until(doc.Expiration); left > want || left < want-2*time.Minute {
				t.Errorf("the session lasts %v, want %v", left, want)
			}
			labtest.Untouched(t, n, imds.Expected{NodeRole: true, Paths: c.paths})
		})
	}
}

// The IPv6 endpoint is the same as the IPv4 one, and what passes through is the node's.
func TestLabEndpoints(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{Network: lab.Bridge})
	labtest.Daemon(t, n, "-issuer", "web-identity", "-allow", "network/interfaces/macs/{mac}/vpc-id")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	served(t, n, p, role)
	for _, e := range []string{endpoint, endpoint6} {
		for path, want := range map[string]string{
			roleList:                               "200 cart",
			"/latest/meta-data/placement/region":   "200 " + lab.Region,
			"/latest/meta-data/local-ipv4":         "200 172.30.0.11",
			"/latest/meta-data/placement/region/":  "200 " + lab.Region,
			"/latest/user-data":                    "404 ",
			"/latest/meta-data/security-groups":    "404 ",
			"/latest/meta-data/tags/instance/Name": "404 ",
			"/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id":           "200 vpc-0123456789abcdef0",
			"/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/subnet-id":        "404 ",
			"/latest/meta-data/network/interfaces/macs/../../../user-data/vpc-id":          "404 ",
			"/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11%2f..%2f../vpc-id": "404 ",
		} {
			status, body, err := ask(ctx, p, http.MethodGet, e+path, nil)
			if got := fmt.Sprintf("%d %s", status, body); err != nil || !strings.HasPrefix(got, want) {
				t.Errorf("%s%s: %s %v, want %s", e, path, got, err, want)
			}
		}
	}
	// The daemon asks which MAC addresses there are before it asks about one.
	labtest.Untouched(t, n, imds.Expected{Paths: []string{"network/interfaces/macs", "network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id"}})
}

// -check and -probe say what is wrong on the node, or that nothing is.
func TestLabCheck(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	run := func(wantCode int, wantText []string, flags ...string) {
		t.Helper()
		code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: append([]string{"-issuer", "web-identity"}, flags...)})
		if err != nil || code != wantCode {
			t.Errorf("%v ends with %d %v, want %d: %s", flags, code, err, wantCode, out)
		}
		for _, want := range wantText {
			if !strings.Contains(out, want) {
				t.Errorf("%v does not say %q: %s", flags, want, out)
			}
		}
	}
	rules := func() string {
		t.Helper()
		out, err := n.Run(ctx, "sh", "-c", "iptables-save | grep IMDSGATE; ip rule; ip -6 rule")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	before := rules()
	run(1, []string{"guard", "fix: "}, "-check")
	if after := rules(); after != before {
		t.Errorf("-check changed the rules: %s", after)
	}
	run(1, nil, "-probe")

	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	with := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	without := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "visitor"})
	run(0, nil, "-check")
	run(0, []string{with.Name, role}, "-check", shop+"/"+with.Name)
	run(1, []string{without.Name, roleAnnotation}, "-check", shop+"/"+without.Name)
	run(0, []string{with.Name, without.Name}, "-check", "-all")
	run(1, []string{"no pod"}, "-check", shop+"/nobody")
	run(0, nil, "-probe")
	d.Kill()
	run(1, nil, "-probe")
}
