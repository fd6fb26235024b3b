package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// The trust policies of docs/roles.md, taken from its text, let STS issue to the pod that they name and to no other.
func TestLabRolesDocument(t *testing.T) {
	recipes := readRoles(t)
	const base, other = "arn:aws:iam::" + lab.Account + ":role/", "210987654321"
	_, issuer, _ := strings.Cut(lab.ProviderARN(), "oidc-provider/")
	for heading, c := range map[string]struct {
		flags       []string
		role        string
		annotations map[string]string
		hop         bool
	}{
		"assume-role":                   {role: base + "cart"},
		"web-identity":                  {role: base + "cart", flags: []string{"-issuer", "web-identity"}},
		"Another account, assume-role":  {role: "arn:aws:iam::" + other + ":role/cart", annotations: map[string]string{"imdsgate.dev/external-id": "shop-7f3a"}},
		"Another account, web-identity": {role: "arn:aws:iam::" + other + ":role/cart", flags: []string{"-issuer", "web-identity"}},
		"Session tags":                  {role: base + "cart", flags: []string{"-session-tags", "-cluster-name", "blue"}},
		"An intermediate role":          {role: base + "cart", flags: []string{"-intermediate-role-arn", base + "hop"}, hop: true},
	} {
		trust, ok := recipes[heading]
		if !ok {
			t.Errorf("docs/roles.md has no recipe %q with a trust policy", heading)
			continue
		}
		delete(recipes, heading)
		t.Run(heading, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{})
			shop := shared.Unique("shop")
			fill := strings.NewReplacer("oidc.example.com/id/ABC", issuer, "node-role", lab.NodeRole, "serviceaccount:shop:", "serviceaccount:"+shop+":", `"shop"`, `"`+shop+`"`)
			statements := parseTrust(t, fill.Replace(trust), issuer)
			roles := []aws.Role{{ARN: c.role, Trust: statements, Allow: []string{aws.ActionListBuckets}}}
			if c.hop {
				roles = append(roles, aws.Role{ARN: base + "hop", Trust: []aws.Trust{{AWS: lab.NodeRoleARN}}, Allow: []string{aws.ActionAssumeRole}})
			}
			for _, r := range roles {
				if err := n.AWS.SetRole(r); err != nil {
					t.Fatal(err)
				}
			}
			n.AWS.SetProvider(aws.Provider{Account: other, Issuer: "https://" + issuer, ClientIDs: []string{"sts.amazonaws.com"}, Keys: shared.ControlPlane.Keys})
			if err := shared.Namespace(ctx, shop, map[string]string{"iam.amazonaws.com/allowed-roles": fmt.Sprintf("[%q]", c.role)}); err != nil {
				t.Fatal(err)
			}
			for account, annotations := range map[string]map[string]string{"cart": c.annotations, "till": nil} {
				all := map[string]string{roleAnnotation: c.role}
				for k, v := range annotations {
					all[k] = v
				}
				if err := shared.ServiceAccount(ctx, shop, account, all); err != nil {
					t.Fatal(err)
				}
			}
			labtest.Daemon(t, n, c.flags...)
			cart := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
			served(t, n, cart, c.role)
			// Where the trust policy cannot tell service accounts apart, the namespace's annotation is what does.
			if heading == "assume-role" || c.hop {
				return
			}
			till := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "till"})
			labtest.Eventually(t, func() error { return wantStatus(till, roleList, http.StatusForbidden) })
			if _, body := get(t, till, roleList); !strings.Contains(body, "AccessDenied") {
				t.Errorf("another service account is answered %s", body)
			}
		})
	}
	for heading := range recipes {
		t.Errorf("the recipe %q of docs/roles.md is not tried", heading)
	}
}

// readRoles returns the trust policies of docs/roles.md by the heading that they stand under.
func readRoles(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../docs/roles.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for section := range strings.SplitSeq(string(b), "\n## ") {
		heading, text, _ := strings.Cut(section, "\n")
		for _, block := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(text, -1) {
			if strings.Contains(block[1], "Principal") {
				found[heading] = block[1]
			} else if !json.Valid([]byte(block[1])) {
				t.Errorf("docs/roles.md: not JSON: %s", block[1])
			}
		}
	}
	return found
}

// parseTrust reads a trust policy as IAM does, as far as docs/roles.md goes; it refuses what it does not know.
func parseTrust(t *testing.T, text, issuer string) (trust []aws.Trust) {
	t.Helper()
	var policy struct {
		Version   string
		Statement []struct {
			Effect    string
			Principal struct{ AWS, Federated string }
			Action    any
			Condition map[string]map[string]string
		}
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&policy); err != nil || policy.Version != "2012-10-17" {
		t.Fatalf("not a policy: %v: %s", err, text)
	}
	for _, s := range policy.Statement {
		p := aws.Trust{AWS: s.Principal.AWS, Federated: s.Principal.Federated, RequestTags: map[string]string{}}
		switch a := s.Action.(type) {
		case string:
			p.Actions = []string{a}
		case []any:
			for _, one := range a {
				p.Actions = append(p.Actions, fmt.Sprint(one))
			}
		}
		for operator, keys := range s.Condition {
			if !slices.Contains([]string{"StringEquals", "StringLike"}, operator) || s.Effect != "Allow" {
				t.Fatalf("%s %s is not understood", s.Effect, operator)
			}
			for key, value := range keys {
				tag, isTag := strings.CutPrefix(key, "aws:RequestTag/")
				switch {
				case isTag:
					p.RequestTags[tag] = value
				case key == "sts:ExternalId":
					p.ExternalID = value
				case key == issuer+":sub":
					p.Subject = value
				case key == issuer+":aud":
					p.Audience = value
				default:
					t.Fatalf("condition key %s is not understood", key)
				}
			}
		}
		trust = append(trust, p)
	}
	return trust
}
